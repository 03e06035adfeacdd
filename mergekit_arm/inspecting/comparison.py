"""Two statistics directories: of one model? And does it matter on what they were measured?

correlation   Pearson's, of mean |x| over the channels of an input
ranks         Spearman's, of the same: outliers count no more than others
angles        principal angles between the k leading directions of both, k the smaller number
overlap       mean cos² of them: 1 for one subspace, k / in for unrelated ones
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_arm.errors import InputError
from mergekit_arm.inspecting.inputs import basis, layer_of, mean_abs
from mergekit_arm.statistics.read import Statistics


@dataclass(frozen=True)
class InputDifference:
    """One input that both directories have measured."""

    site: str
    layer: int | None
    correlation: float | None
    """None without importance in both, or where all channels of one are alike."""
    ranks: float | None
    directions: int | None
    """k; None without subspaces in both."""
    overlap: float | None
    mean_angle: float | None
    """In degrees, as the next."""
    largest_angle: float | None


@dataclass(frozen=True)
class LayerDifference:
    """The means over the inputs of a layer, and the largest angle."""

    layer: int | None
    """None: outside the layers."""
    inputs: int
    correlation: float | None
    ranks: float | None
    overlap: float | None
    mean_angle: float | None
    largest_angle: float | None


@dataclass(frozen=True)
class Comparison:
    """What two directories have in common."""

    references: tuple[str, str]
    same_model: bool
    """Whether every weight has the same name, shape, dtype and probe."""
    same_weights: tuple[int, int]
    """How many weights of the same name, and of them how many with the same values."""
    differences: dict[str, tuple[str, str]]
    """Facts of the data and settings that are not the same."""
    inputs: list[InputDifference]

    def layers(self) -> list[LayerDifference]:
        """Return the inputs' numbers by layer, what is outside the layers last."""
        by_layer: dict[int | None, list[InputDifference]] = defaultdict(list)
        for one in self.inputs:
            by_layer[one.layer].append(one)
        order = sorted(by_layer, key=lambda layer: (layer is None, layer or 0))
        return [
            LayerDifference(
                layer=layer,
                inputs=len(by_layer[layer]),
                correlation=_mean([one.correlation for one in by_layer[layer]]),
                ranks=_mean([one.ranks for one in by_layer[layer]]),
                overlap=_mean([one.overlap for one in by_layer[layer]]),
                mean_angle=_mean([one.mean_angle for one in by_layer[layer]]),
                largest_angle=max(
                    (one.largest_angle for one in by_layer[layer] if one.largest_angle is not None),
                    default=None,
                ),
            )
            for layer in order
        ]

    def fields(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {**asdict(self), "layers": [asdict(one) for one in self.layers()]}


def compare(one: Statistics, other: Statistics) -> Comparison:
    """Compare two directories, one input at a time.

    Raises:
        InputError: they have no input in common, or one is damaged.
    """
    sites = [
        site
        for site, record in one.metadata.sites.items()
        if site in other.metadata.sites
        and record.width == other.metadata.sites[site].width
        and isinstance(record.tokens, list) == isinstance(other.metadata.sites[site].tokens, list)
    ]
    if not sites:
        raise InputError(
            f"{one.reference} ({one.metadata.model.reference}) and {other.reference} "
            f"({other.metadata.model.reference}) have measured no input of the same name and "
            "width: compare statistics of one architecture"
        )
    return Comparison(
        references=(one.reference, other.reference),
        same_model=one.metadata.model.content_hash == other.metadata.model.content_hash,
        same_weights=_same_weights(one, other),
        differences=_differences(one, other),
        inputs=[_input(one, other, site) for site in sites],
    )


def principal_angles(one: Tensor, other: Tensor) -> Tensor:
    """Return the principal angles between two subspaces, rising.

    Args:
        one: in × k, orthonormal columns.
        other: in × k, orthonormal columns.

    Returns:
        (k,) float64, in degrees, in [0, 90]. Small angles by their sines, where cosines have no
        digits left (Björck and Golub, 1973).
    """
    one, other = one.double(), other.double()
    products = one.T @ other
    cosines = torch.linalg.svdvals(products).clamp(max=1)
    sines = torch.linalg.svdvals(other - one @ products).clamp(max=1).flip(0)[: len(cosines)]
    angles = torch.where(cosines**2 < 0.5, cosines.acos(), sines.asin())
    return angles.rad2deg()


def pearson(one: Tensor, other: Tensor) -> float | None:
    """Return the correlation of two vectors; None where one is constant."""
    a, b = (v.double().flatten() - v.double().mean() for v in (one, other))
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else None


def spearman(one: Tensor, other: Tensor) -> float | None:
    """Return the correlation of two vectors' ranks, equal values sharing the mean of theirs."""
    return pearson(_ranks(one.flatten()), _ranks(other.flatten()))


def _ranks(values: Tensor) -> Tensor:
    rising = values.double().sort().values
    below = torch.searchsorted(rising, values.double())
    not_above = torch.searchsorted(rising, values.double(), right=True)
    return (below + not_above).double()  # twice the mean rank, up to a constant


def _input(one: Statistics, other: Statistics, site: str) -> InputDifference:
    values = mean_abs(one, site), mean_abs(other, site)
    correlation = ranks = None
    if values[0] is not None and values[1] is not None and values[0].shape == values[1].shape:
        correlation, ranks = pearson(values[0], values[1]), spearman(values[0], values[1])
    bases = basis(one, site), basis(other, site)
    directions = overlap = mean_angle = largest = None
    if bases[0] is not None and bases[1] is not None:
        directions = min(bases[0].shape[1], bases[1].shape[1])
        if directions:
            angles = principal_angles(bases[0][:, :directions], bases[1][:, :directions])
            overlap = float(angles.deg2rad().cos().square().mean())
            mean_angle, largest = float(angles.mean()), float(angles.max())
    return InputDifference(
        site, layer_of(site), correlation, ranks, directions, overlap, mean_angle, largest
    )


def _same_weights(one: Statistics, other: Statistics) -> tuple[int, int]:
    common = [name for name in one.metadata.weights if name in other.metadata.weights]
    same = sum(torch.equal(one.probe(name), other.probe(name)) for name in common)
    return len(common), same


def _differences(one: Statistics, other: Statistics) -> dict[str, tuple[str, str]]:
    found = {}
    for part in ("model", "data", "settings"):
        mine, theirs = (
            getattr(statistics.metadata, part).model_dump(mode="json")
            for statistics in (one, other)
        )
        for name in mine:
            if mine[name] != theirs[name]:
                found[f"{part}.{name}"] = (str(mine[name]), str(theirs[name]))
    return found


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
