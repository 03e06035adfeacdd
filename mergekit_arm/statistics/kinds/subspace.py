"""Subspace: the directions in which a site's inputs mostly lie, for ARM.

The mathematics is in ``second_moment.py``. Measured where a matrix other than the output head
reads: nothing else is rotated. Nor are experts: their sketches would be a hundred times those of
the rest of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergekit_arm.errors import InputError
from mergekit_arm.statistics.format import EXPERTS, SettingsRecord, SiteRecord, WeightRecord
from mergekit_arm.statistics.kinds.base import (
    LEFT_OUT,
    Directory,
    Kind,
    MeasuredInput,
    Observer,
    TensorSpec,
)
from mergekit_arm.statistics.kinds.second_moment import (
    Dominant,
    add_second_moment,
    chosen_rank,
    columns_for_energy,
    dominant_subspace,
    is_whole,
    missed,
    orthonormal,
    sketch_matrix,
    stored_directions,
)

_SKETCH_MATRIX = "sketch_matrix"
"""Beginning of the tensors' names that hold Ω, one for each width, beside kept sketches."""


@dataclass(frozen=True)
class Subspace(Kind):
    """The leading eigenvectors of an input's second moment, from a sample of the tokens."""

    name: ClassVar[str] = "subspace"
    sampled: ClassVar[bool] = True
    recorded: ClassVar[tuple[str, ...]] = ("rank", "energy", "subspace_tokens")

    rank: int | None = None
    """r, the columns of a sketch, at least 1; ``default_rank`` where None."""
    energy: float = 0.9
    """p in (0, 1]: the fewest directions are stored that hold p · tr C."""
    subspace_tokens: int = 16384
    """Tokens in the sample."""
    seed: int = 42
    """Decides Ω. States add only if rank and seed agree."""
    keep_sketch: bool = False
    """Store what accumulated beside the basis, so that directories can be added."""

    def state(self, width: int) -> dict[str, TensorSpec]:
        columns = width if self._whole(width) else chosen_rank(width, self.rank)
        return {
            "sketch": TensorSpec(torch.float32, (width, columns), lowest=None),
            "square_norm": TensorSpec(torch.float64, ()),
            "subspace_tokens": TensorSpec(torch.int64, ()),
        }

    def observer(self, width: int, device: torch.device) -> SubspaceSketch:
        omega = sketch_matrix(width, chosen_rank(width, self.rank), self.seed, device)
        return SubspaceSketch(self, width, device, omega)

    def stored(self, width: int) -> dict[str, TensorSpec]:
        most = stored_directions(width, chosen_rank(width, self.rank))
        finished = {
            "basis": TensorSpec(torch.bfloat16, (width, most), at_most=True, lowest=None),
            "eigenvalues": TensorSpec(torch.float32, (most,), at_most=True),
            "trace": TensorSpec(torch.float64, ()),
            "subspace_tokens": TensorSpec(torch.int64, ()),
        }
        return finished | (self.state(width) if self.keep_sketch else {})

    def shared(self, width: int) -> dict[str, TensorSpec]:
        if self._whole(width) or not self.keep_sketch:
            return {}
        shape = (width, chosen_rank(width, self.rank))
        return {f"{_SKETCH_MATRIX}.{width}": TensorSpec(torch.float32, shape, lowest=None)}

    def make_shared(self, width: int) -> dict[str, Tensor]:
        cpu = torch.device("cpu")
        omega = sketch_matrix(width, chosen_rank(width, self.rank), self.seed, cpu)
        return {} if omega is None else dict.fromkeys(self.shared(width), omega)

    def adding_up(self) -> Subspace:
        return dataclasses.replace(self, keep_sketch=True)

    def left_out(self, source: MeasuredInput) -> str | None:
        if not source.matrix:
            return "norms only"
        if source.experts is not None:
            return EXPERTS
        return "output head" if source.head else None

    def describe(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        held = float(tensors["eigenvalues"].double().sum() / tensors["trace"])
        # Nothing is the share of nothing: an input that was always zero has no energy to hold.
        energy = round(min(held, 1.0), 6) if held == held else None
        return {"subspace": tensors["basis"].shape[1], "energy": energy}

    def to_record(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        # Beside the fields of all kinds, where format 1 had them before there was a third kind.
        return {"no_subspace" if name == LEFT_OUT else name: fact for name, fact in facts.items()}

    def from_record(self, record: SiteRecord | SettingsRecord) -> dict[str, Any]:
        names = {"subspace": "subspace", "energy": "energy", "no_subspace": LEFT_OUT}
        if isinstance(record, SettingsRecord):
            names = {name: name for name in self.recorded}
        found = {names[name]: getattr(record, name) for name in names}
        return {name: fact for name, fact in found.items() if fact is not None}

    def inconsistent(self, site: SiteRecord, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        columns, values = shapes["basis"][-1], shapes["eigenvalues"][-1]
        if columns == values == site.subspace:
            return None
        return f"{columns} directions, {values} eigenvalues, {site.subspace} recorded"

    def notes(self, sites: Iterable[SiteRecord]) -> list[str]:
        found = [site for site in sites if site.energy is not None]
        short = [site for site in found if missed(site.energy or 0.0, self.energy)]
        if not short:
            return []
        held = sorted(site.energy or 0.0 for site in short)
        ranks = [chosen_rank(site.width, self.rank) for site in short]
        wider = any(rank < site.width for rank, site in zip(ranks, short, strict=True))
        remedy = (
            f"--rank above {max(ranks)} stores more of them"
            if wider
            else "inputs of so few channels have no more of them, at any --rank"
        )
        return [
            (
                f"--energy {self.energy:g} was not reached at {len(short)} of {len(found)} inputs: "
                f"the directions stored there hold {held[0]:.3f} to {held[-1]:.3f} of the second "
                f"moment; {remedy}"
            )
        ]

    def basis(self, directory: Directory, record: WeightRecord, energy: float) -> Tensor | None:
        """Return the basis of a weight's dominant input subspace.

        Args:
            directory: open statistics.
            record: a measured weight (``record.site`` is set).
            energy: p in (0, 1], the share of the second moment's trace to hold.

        Returns:
            (in, k) float32, orthonormal columns by falling eigenvalue; None where the run left
            subspaces out on purpose (the output head, norms, experts).

        Raises:
            InputError: subspaces were not measured, or hold less energy than asked for.
        """
        site = self._measured_at(directory, record)
        if site is None:
            return None
        where = f"activation_stats {directory.reference}: {site}"

        def read() -> Tensor:
            stored = directory.tensor(site, "basis")
            return orthonormal(stored[:, : self.columns(directory, record, energy)], where)

        return directory.once((self.name, site, energy), read)

    def eigenpairs(
        self, directory: Directory, record: WeightRecord
    ) -> tuple[Tensor, Tensor] | None:
        """Return all that is stored of C's eigenvectors and eigenvalues: in × k and (k,), float32.

        None where ``basis`` returns None. Raises InputError where that does, or it is damaged.
        """
        site = self._measured_at(directory, record)
        if site is None:
            return None
        where = f"activation_stats {directory.reference}: {site}"
        basis = orthonormal(directory.tensor(site, "basis"), where)
        return basis, directory.tensor(site, "eigenvalues")

    def columns(self, directory: Directory, record: WeightRecord, energy: float) -> int | None:
        """Return how many columns ``basis`` has, without reading them; None where it is None.

        Raises:
            InputError: as ``basis`` does.
        """
        site = self._measured_at(directory, record)
        if site is None:
            return None
        return columns_for_energy(
            directory.tensor(site, "eigenvalues"),
            float(directory.tensor(site, "trace")),
            energy,
            measured=directory.metadata.settings.energy or 1.0,
            where=f"activation_stats {directory.reference}: {site}",
        )

    @staticmethod
    def _measured_at(directory: Directory, record: WeightRecord) -> str | None:
        """Return the site of a measured weight; None where the run left subspaces out there."""
        assert record.site is not None
        return None if directory.metadata.sites[record.site].no_subspace else record.site

    def adder(self, parts: Sequence[Directory], width: int) -> SubspaceSketch:
        # Ω as stored: another torch may draw other numbers from the same seed.
        omega = None
        for name in self.shared(width):
            omega, *others = (part.stored(name) for part in parts)
            for part, other in zip(parts[1:], others, strict=True):
                if not torch.equal(omega, other):
                    raise InputError(
                        f"{parts[0].reference} and {part.reference} do not add up: their sketches "
                        "were drawn from different random numbers; calibrate both with the same "
                        "torch"
                    )
        return SubspaceSketch(self, width, torch.device("cpu"), omega)

    def not_addable(self) -> str:
        return (
            "holds finished subspaces, which do not add up: calibrate with --keep-sketch to "
            "combine them, or with --statistics importance if aim is all they are for"
        )

    def _whole(self, width: int) -> bool:
        return is_whole(width, chosen_rank(width, self.rank))


class SubspaceSketch(Observer):
    """Sketches the second moment of a site's inputs.

    Batches are multiplied and summed in float32: the second moment is wanted to about 1e-4, and
    a float64 sketch would be the largest thing that a calibration holds
    (``tests/statistics/kinds/test_subspace.py`` shows the error after a thousand batches). Holds
    in × r float32 values, or in × in where 2 r ≥ in, and a float32 copy of the batch.
    """

    def __init__(
        self, settings: Subspace, width: int, device: torch.device, omega: Tensor | None
    ) -> None:
        """Start with nothing seen.

        Args:
            settings: rank, energy, and whether the sketch is stored.
            width: input channels.
            device: where inputs live.
            omega: Ω on ``device``, or None for the identity.
        """
        super().__init__(settings.state(width), device)
        self._settings = settings
        self._omega = omega

    def update(self, x: Tensor) -> None:
        x = x.float()
        sketch, square_norm = self.sums["sketch"], self.sums["square_norm"]
        if self._omega is None:
            add_second_moment(sketch, x)
        else:
            sketch.addmm_(x.T, x @ self._omega)
        # Channel by channel first: a sum to one number depends on how many threads share it.
        square_norm += x.square().sum(0).to(square_norm.dtype).sum()
        self.sums["subspace_tokens"] += x.shape[0]

    def dominant(self) -> Dominant:
        """Return the leading eigenvectors; see ``dominant_subspace``."""
        width = self.sums["sketch"].shape[0]
        return dominant_subspace(
            self.sums["sketch"],
            self._omega,
            float(self.sums["square_norm"]),
            int(self.sums["subspace_tokens"]),
            energy=self._settings.energy,
            most=stored_directions(width, chosen_rank(width, self._settings.rank)),
        )

    def finish(self) -> dict[str, Tensor]:
        found = self.dominant()
        finished = {
            "basis": found.basis.bfloat16(),  # ``orthonormal`` undoes the rounding
            "eigenvalues": found.eigenvalues.float(),
            "trace": torch.tensor(found.trace, dtype=torch.float64),
            "subspace_tokens": torch.tensor(found.tokens),
        }
        return finished | (self.state() if self._settings.keep_sketch else {})

    def checksum(self) -> Tensor:
        return self.sums["square_norm"]


SUBSPACE = Subspace()
