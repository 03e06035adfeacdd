"""Statistics from an importance matrix: llama.cpp's sums, and the probes of the model's weights."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergekit_arm import __version__
from mergekit_arm.calibration.inputs.coverage import Coverage, CoveredWeight, cover_checkpoint
from mergekit_arm.calibration.inputs.merge_names import add_asked_names
from mergekit_arm.calibration.inputs.readings import plan_readings
from mergekit_arm.errors import InputError
from mergekit_arm.files import hash_file, try_writing
from mergekit_arm.imatrix.files import Entry, ImportanceMatrix, read_imatrix
from mergekit_arm.imatrix.names import LlamaName, LlamaNames
from mergekit_arm.models.checkpoint import fetch_checkpoint, open_checkpoint
from mergekit_arm.models.loading import empty_model, find_model
from mergekit_arm.statistics.card import statistics_card
from mergekit_arm.statistics.format import (
    NOT_THERE,
    DataRecord,
    Metadata,
    ModelRecord,
    SettingsRecord,
    SiteRecord,
    WeightRecord,
)
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.write import PROBES, ROWS, check_destination, write_statistics

Numbers = NDArray[np.float64]

RECIPE = "imatrix"
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Imported:
    """What was written."""

    out: Path
    metadata: Metadata
    unused: list[str]
    """Entries of the matrix that no weight of the model has."""
    magnitudes: bool
    """Whether ``importance: mean_abs`` works with it."""

    @property
    def reasons(self) -> dict[str, int]:
        """Why weights have no statistics, and how many."""
        weights = self.metadata.weights.values()
        return dict(Counter(one.reason for one in weights if one.reason))


def import_imatrix(
    file: str | Path,
    model: str,
    out: str | Path,
    *,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Imported:
    """Write statistics to ``out``: what ``file`` knows of the inputs of ``model``'s weights.

    Loads no model: reads the probes of its weights, and the matrix.

    Raises:
        InputError: no importance matrix, one of another model, or a model that llama.cpp does
            not know; nothing has been written then.
    """
    file, out = Path(file), Path(out)
    check_destination(out, force)
    try_writing(out)
    matrix = read_imatrix(file)
    with find_model(model, trust_remote_code=trust_remote_code) as source:
        layers = getattr(source.config.get_text_config(), "num_hidden_layers", 0)
        names = LlamaNames(source.config.model_type, layers)
        fetch_checkpoint(source)
        checkpoint = open_checkpoint(source)
        empty = empty_model(source, torch.float32)
        coverage = cover_checkpoint(empty, checkpoint, plan_readings(empty))
        add_asked_names(coverage, empty, checkpoint, source.config)
        sites = _Sites(matrix, f"{file} and {model}")
        records = {
            weight.name: _record(row, weight, coverage, names, sites)
            for row, weight in enumerate((*coverage.weights, *coverage.converted))
        }
        if not sites.entry_of:
            raise InputError(
                f"{file} is of none of {model}'s weights: it has "
                f"{', '.join(list(matrix.entries)[:3])}, …"
            )
        magnitudes = all(matrix.entries[e].magnitudes is not None for e in sites.entry_of.values())
        kind = replace(IMPORTANCE, magnitudes=magnitudes)
        metadata = Metadata(
            model=ModelRecord(
                reference=model,
                revision=source.commit,
                architecture=coverage.architecture,
                content_hash=coverage.content_hash(),
            ),
            data=_data(matrix, file),
            settings=SettingsRecord(
                statistics=[kind.name],
                dtype=_UNKNOWN,
                device=_UNKNOWN,
                **kind.to_record(kind.settings()),
            ),
            versions={"mergekit-arm": __version__},
            sites=sites.records(),
            weights={weight.name: records[weight.name] for weight in coverage.weights},
            converted={weight.name: records[weight.name] for weight in coverage.converted},
            aliases=dict(sorted(coverage.aliases.items())),
        )
    tensors = {PROBES: coverage.probes, ROWS: torch.empty(0, dtype=torch.int64)}
    tensors |= sites.tensors(magnitudes=magnitudes)
    write_statistics(out, metadata, tensors, statistics_card(metadata, out.name), force=force)
    unused = sorted(matrix.entries.keys() - set(sites.entry_of.values()))
    return Imported(out, metadata, unused, magnitudes)


class _Sites:
    """The inputs that weights were found to read, one for each entry of the matrix."""

    def __init__(self, matrix: ImportanceMatrix, where: str) -> None:
        self._matrix = matrix
        self._where = where
        self.entry_of: dict[str, str] = {}
        """Site → entry."""
        self._stacked: set[str] = set()
        self._width: dict[str, int] = {}

    def add(self, weight: CoveredWeight, name: LlamaName, axis: int) -> str | None:
        """Return the site of a weight; None where the matrix does not have it."""
        entry = self._matrix.entries.get(name.name)
        if entry is None:
            return None
        experts = weight.shape[0] if len(weight.shape) == 3 else None
        stacked = name.expert is not None or experts is not None
        rows, width = self._shape(entry, experts, weight.shape[axis])
        last = name.expert if name.expert is not None else (experts or 1) - 1
        if width != weight.shape[axis] or last >= rows or (not stacked and rows != 1):
            raise InputError(
                f"{self._where} do not belong together: {weight.name} is {list(weight.shape)}, "
                f"and the importance matrix has {rows} × {width} for {name.name}"
            )
        found = next((site for site, other in self.entry_of.items() if other == name.name), None)
        if found is None:
            found = re.sub(r"(?<=\.experts)\.\d+", "", weight.name).removesuffix(".weight")
            self.entry_of[found] = name.name
            self._width[found] = width
            if stacked:
                self._stacked.add(found)
        return found

    @staticmethod
    def _shape(entry: Entry, experts: int | None, width: int) -> tuple[int, int]:
        rows, columns = entry.squares.shape
        if rows == 1 and columns != width and columns % width == 0:
            return columns // width, width  # the old format has a stack's rows one after another
        return rows, columns

    def records(self) -> dict[str, SiteRecord]:
        """Return what the metadata say of the sites."""
        found = {}
        for site in self.entry_of:
            squares, counts, _ = self._values(site)
            tokens = [round(one) for one in counts.tolist()]
            found[site] = SiteRecord(
                width=squares.shape[1], tokens=tokens if site in self._stacked else tokens[0]
            )
        return found

    def tensors(self, *, magnitudes: bool) -> dict[str, Tensor]:
        """Return what is stored of the sites."""
        found = {}
        for site in self.entry_of:
            squares, _, absolute = self._values(site)
            rows = slice(None) if site in self._stacked else 0
            found[f"{site}.square_sum"] = torch.from_numpy(squares[rows].copy())
            if magnitudes and absolute is not None:
                found[f"{site}.abs_sum"] = torch.from_numpy(absolute[rows].copy())
        return found

    def _values(self, site: str) -> tuple[Numbers, Numbers, Numbers | None]:
        """Return Σx², tokens and Σ|x| of every row."""
        entry = self._matrix.entries[self.entry_of[site]]
        width = self._width[site]
        squares = entry.squares.reshape(-1, width)
        counts = np.broadcast_to(entry.counts, (len(squares),)).copy()
        if not self._matrix.chunk_size and site in self._stacked:
            # The old format has ones, times the chunks, for an expert that saw nothing.
            counts[(squares == counts[:, None]).all(1)] = 0
            squares = np.where(counts[:, None] > 0, squares, 0)
        absolute = entry.magnitudes
        return squares, counts, None if absolute is None else absolute.reshape(-1, width)


def _record(
    row: int, weight: CoveredWeight, coverage: Coverage, names: LlamaNames, sites: _Sites
) -> WeightRecord:
    found = WeightRecord(
        shape=list(weight.shape), dtype=weight.dtype, probe=row, reason=weight.reason
    )
    if weight.reason is not None:
        return found
    plan = coverage.plan
    reads = all(part.parameter in plan.readings for part in weight.parts)
    listed = {plan.reasons.get(part.parameter) for part in weight.parts} - {None}
    if listed and not reads:
        return found.model_copy(update={"reason": sorted(map(str, listed))[0]})
    candidates = [names.of(weight.name)]
    if reads and candidates[0] and candidates[0].name == "token_embd.weight":
        candidates.append(LlamaName("output.weight"))  # tied: read as the head
    axis = _input_axis(weight, coverage)
    for name in candidates:
        site = None if name is None or axis is None else sites.add(weight, name, axis)
        if site is not None and name is not None and axis is not None:
            expert = name.expert if len(weight.shape) == 2 else None
            return found.model_copy(update={"site": site, "input_axis": axis, "row": expert})
    return found.model_copy(update={"reason": NOT_THERE})


def _input_axis(weight: CoveredWeight, coverage: Coverage) -> int | None:
    """Return the axis of a matrix that its input runs along; None for what is no matrix."""
    if len(weight.shape) < 2:
        return None
    part = weight.parts[0]
    reading = coverage.plan.readings.get(part.parameter)
    if reading is not None and len(part.axes) == len(weight.shape):
        axis: int | None = part.axes[reading.input_axis]
        return axis
    return len(weight.shape) - 1  # of experts: out × in, as every architecture of llama.cpp's has


def _data(matrix: ImportanceMatrix, file: Path) -> DataRecord:
    chunks, size = matrix.chunks, matrix.chunk_size
    return DataRecord(
        dataset=" + ".join(matrix.datasets) or _UNKNOWN,
        column=_UNKNOWN,
        sequence_length=size or None,
        sequences=chunks,
        tokens=chunks * size,
        content_hash=hash_file(file),
        recipe=RECIPE,
    )
