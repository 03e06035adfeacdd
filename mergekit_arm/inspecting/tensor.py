"""One weight of a statistics directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mergekit_arm.errors import InputError, did_you_mean
from mergekit_arm.inspecting.inputs import mean_abs, skew
from mergekit_arm.statistics.format import WeightRecord
from mergekit_arm.statistics.read import Statistics

SHOWN = 5
"""Channels and eigenvalues that are named."""


@dataclass(frozen=True)
class TensorFacts:
    """One weight."""

    name: str
    """Under which it was measured."""
    record: WeightRecord
    tokens: int | None
    shared: list[str]
    """Other weights that read the same input."""
    peak: float | None
    held: float | None
    channels: list[tuple[int, float]]
    """The channels of the largest mean |x|, and that; of a stack of experts, of all its rows."""
    rank: int | None
    energy: float | None
    leading: list[float]
    """Shares of the second moment that the first directions hold."""

    def fields(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {**asdict(self), "record": self.record.model_dump(exclude_none=True)}


def look_up(statistics: Statistics, name: str) -> TensorFacts:
    """Return what a directory says of one weight.

    Raises:
        InputError: there is no such weight, or the directory is damaged.
    """
    metadata, weights = statistics.metadata, statistics.matcher.weights
    name = metadata.aliases.get(name, name)
    if name not in weights and f"{name}.weight" in weights:
        name = f"{name}.weight"
    record = weights.get(name)
    if record is None:
        meant = did_you_mean(name, [*weights, *metadata.aliases])
        raise InputError(f"{statistics.reference} knows no tensor {name!r}{meant}")
    if record.site is None:
        return TensorFacts(name, record, None, [], None, None, [], None, None, [])
    site = metadata.sites[record.site]
    tokens: int | list[int] = site.tokens
    values = mean_abs(statistics, record.site)
    if isinstance(tokens, list):
        tokens = sum(tokens) if record.row is None else tokens[record.row]
    if values is not None and record.row is not None:
        values = values[record.row]
    channels: list[tuple[int, float]] = []
    if values is not None:
        summed = values.reshape(-1, values.shape[-1]).amax(0)
        top = summed.topk(min(SHOWN, len(summed)))
        channels = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    leading: list[float] = []
    if site.subspace is not None:
        eigenvalues = statistics.tensor(record.site, "eigenvalues")[:SHOWN].double()
        trace = float(statistics.tensor(record.site, "trace"))
        leading = (eigenvalues / trace).tolist() if trace else []
    peak, held = (None, None) if values is None else skew(values)
    return TensorFacts(
        name=name,
        record=record,
        tokens=tokens,
        shared=[other for other, w in weights.items() if w.site == record.site and other != name],
        peak=peak,
        held=held,
        channels=channels,
        rank=site.subspace,
        energy=site.energy,
        leading=leading,
    )
