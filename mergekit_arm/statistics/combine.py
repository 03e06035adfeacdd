"""Add statistics directories: one model, one way of measuring, disjoint data.

What a directory holds adds up, so two directories together say what one run on both data sets
would have measured. What a kind finishes, and does not add up, it makes again from what does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mergekit_arm.errors import InputError
from mergekit_arm.statistics.card import statistics_card
from mergekit_arm.statistics.format import (
    DataRecord,
    Metadata,
    MixtureRecord,
    SiteRecord,
    WeightRecord,
)
from mergekit_arm.statistics.kinds import kind
from mergekit_arm.statistics.kinds.base import LEFT_OUT, Kind
from mergekit_arm.statistics.kinds.site import measured_widths, site_record
from mergekit_arm.statistics.read import Statistics, open_statistics
from mergekit_arm.statistics.write import PROBES, ROWS, check_destination, write_statistics

_SAME_DATA = ("sequence_length", "tokenizer_hash")
"""What decides how a row becomes tokens; the sums of two ways are those of neither.

A seed, a recipe or a chat template decides which rows and which words: those of disjoint rows add.
"""


def combine(references: Sequence[str], out: str | Path, *, force: bool = False) -> Metadata:
    """Add the directories ``references`` and write the sum to ``out``.

    The order of ``references`` does not matter. Holds the result.

    Raises:
        InputError: they do not add up; the first difference is named.
    """
    out = Path(out)
    check_destination(out, force)
    if len(references) < 2:
        raise InputError("combine adds directories: name two or more, and then OUT")
    parts = sorted(
        (open_statistics(reference) for reference in references),
        key=lambda part: part.metadata.data.content_hash,
    )
    for part in parts[1:]:
        _check_same(parts[0], part)
    rows = _disjoint_rows(parts)
    _check_shared(parts)
    sites, tensors = _add_sites(parts)
    weights = [_add_weights([p.metadata.weights for p in parts], sites, parts)]
    weights.append(_add_weights([p.metadata.converted for p in parts], sites, parts))
    first = parts[0].metadata
    metadata = first.model_copy(
        update={
            "data": _add_data([part.metadata.data for part in parts]),
            "versions": _all_versions(parts),
            "sites": sites,
            "weights": weights[0],
            "converted": weights[1],
        }
    )
    tensors[PROBES] = parts[0].stored(PROBES)
    tensors[ROWS] = rows
    write_statistics(out, metadata, tensors, statistics_card(metadata, out.name), force=force)
    return metadata


def _check_same(one: Statistics, other: Statistics) -> None:
    """Refuse two directories of different models or ways of measuring."""
    ours, theirs = one.metadata, other.metadata
    where = f"{one.reference} and {other.reference} do not add up"
    if ours.model.content_hash != theirs.model.content_hash:
        raise InputError(
            f"{where}: they were measured on different models, {ours.model.reference} "
            f"({ours.model.content_hash[:16]}) and {theirs.model.reference} "
            f"({theirs.model.content_hash[:16]})"
        )
    settings = [(name, *_pair(ours.settings, theirs.settings, name)) for name in _fields(ours)]
    data = [(name, *_pair(ours.data, theirs.data, name)) for name in _SAME_DATA]
    for name, mine, yours in settings + data:
        if mine != yours:
            raise InputError(
                f"{where}: {name.replace('_', ' ')} was {mine} for one and {yours} for the other"
            )
    if set(ours.weights) != set(theirs.weights) or set(ours.converted) != set(theirs.converted):
        raise InputError(f"{where}: they list different weights")


def _fields(metadata: Metadata) -> Iterable[str]:
    return type(metadata.settings).model_fields


def _pair(one: object, other: object, name: str) -> tuple[object, object]:
    return getattr(one, name), getattr(other, name)


def _disjoint_rows(parts: list[Statistics]) -> Tensor:
    """Return all rows of data, none of which two parts share."""
    known: Tensor = torch.zeros(0, dtype=torch.int64)
    for number, part in enumerate(parts):
        try:
            rows = part.stored(ROWS)
        except KeyError:
            raise InputError(
                f"{part.reference} does not say which rows of data it was measured on, so that "
                "nobody knows whether another used the same: calibrate again"
            ) from None
        shared = int(torch.isin(rows, known).sum())
        if shared:
            other = next(p for p in parts[:number] if torch.isin(rows, p.stored(ROWS)).any())
            raise InputError(
                f"{other.reference} and {part.reference} do not add up: {shared} of {len(rows)} "
                "rows of data were measured in both, and would count twice; "
                "`calibrate --part 1/2` and `--part 2/2` share none"
            )
        known = torch.cat([known, rows])
    return known.sort().values


def _kinds(measured: Metadata) -> list[Kind]:
    """Return the kinds that ``measured`` holds, with its settings, so that they add up."""
    seed = {} if measured.data.seed is None else {"seed": measured.data.seed}
    return [
        one.configured({**one.from_record(measured.settings), **seed}).adding_up()
        for one in map(kind, measured.settings.statistics)
    ]


def _check_shared(parts: list[Statistics]) -> None:
    """Refuse parts of which one lacks what inputs of a width share, or drew it by another seed."""
    for one in _kinds(parts[0].metadata):
        widths = {
            width for part in parts for width in measured_widths(one, part.metadata.sites.values())
        }
        for name in sorted(name for width in widths for name in one.shared(width)):
            first, *others = (_shared(part, name) for part in parts)
            for part, other in zip(parts[1:], others, strict=True):
                ours, theirs = parts[0].metadata.data.seed, part.metadata.data.seed
                if ours != theirs and not torch.equal(first, other):
                    raise InputError(
                        f"{parts[0].reference} and {part.reference} do not add up: {name} was "
                        f"drawn with seed {ours} for one and {theirs} for the other; sketches "
                        "need one seed, importance alone does not (--statistics importance)"
                    )


def _shared(part: Statistics, name: str) -> Tensor:
    try:
        return part.stored(name)
    except KeyError:
        raise InputError(
            f"{part.reference} does not hold {name}, without which its sketches do not add up: "
            "calibrate again with --keep-sketch"
        ) from None


def _add_sites(parts: list[Statistics]) -> tuple[dict[str, SiteRecord], dict[str, Tensor]]:
    """Return the records of all sites, and what is stored of them and once for all of a width."""
    kinds = _kinds(parts[0].metadata)
    records: dict[str, SiteRecord] = {}
    tensors: dict[str, Tensor] = {}
    for name in {name: None for part in parts for name in part.metadata.sites}:
        holding = [part for part in parts if name in part.metadata.sites]
        sites = [part.metadata.sites[name] for part in holding]
        counts = torch.stack([torch.tensor(site.tokens) for site in sites])
        facts = {one.name: one.from_record(sites[0]) for one in kinds}
        left_out = {one: fact[LEFT_OUT] for one, fact in facts.items() if LEFT_OUT in fact}
        here = [one for one in kinds if one.name not in left_out]
        added = {key: value for one in here for key, value in one.add(holding, name).items()}
        records[name] = site_record(kinds, sites[0].width, counts.sum(0).tolist(), added, left_out)
        tensors |= {f"{name}.{key}": value for key, value in added.items()}
    for one in kinds:
        for width in measured_widths(one, records.values()):
            tensors |= {name: parts[0].stored(name) for name in one.shared(width)}
    return records, tensors


def _add_weights(
    records: list[dict[str, WeightRecord]],
    sites: Mapping[str, SiteRecord],
    parts: list[Statistics],
) -> dict[str, WeightRecord]:
    """Return each weight's record, from a part that measured it where not all did."""
    added = {}
    for name in records[0]:
        every = [part[name] for part in records]
        measured = [record for record in every if record.site is not None]
        chosen = (measured or every)[0]
        if any((r.site, r.row, r.input_axis) != (chosen.site, chosen.row, chosen.input_axis)
               for r in measured):  # fmt: skip
            raise InputError(
                f"{' and '.join(part.reference for part in parts)} do not add up: "
                f"{name} was measured at different inputs"
            )
        added[name] = chosen.model_copy(update={"probe": records[0][name].probe})
    return added


def _add_data(records: list[DataRecord]) -> DataRecord:
    digest = hashlib.sha256("".join(record.content_hash for record in records).encode())
    update: dict[str, object] = {
        name: _joined(getattr(record, name) for record in records)
        for name in (
            "dataset", "subset", "split", "part", "column", "template_hash", "tokenizer",
        )
    }  # fmt: skip
    seeds = {record.seed for record in records}
    update["seed"] = seeds.pop() if len(seeds) == 1 else None
    recipes = [record.recipe for record in records]
    update["recipe"] = _joined(one or "packed" for one in recipes) if any(recipes) else None
    limits = [n for record in records if (n := record.max_tokens_per_row) is not None]
    # The most that any row gave, where all parts have a limit of their own.
    update["max_tokens_per_row"] = max(limits) if len(limits) == len(records) else None
    if any(record.mixture for record in records):
        update["mixture"] = [
            one for record in records for one in record.mixture or [_whole(record)]
        ]
    update["sequences"] = sum(record.sequences for record in records)
    update["tokens"] = sum(record.tokens for record in records)
    update["content_hash"] = digest.hexdigest()
    return records[0].model_copy(update=update)


def _whole(record: DataRecord) -> MixtureRecord:
    """Return what a part of one data set gave, as one of a mixture's."""
    return MixtureRecord(
        dataset=record.dataset,
        weight=float(record.sequences),
        split=record.split,
        column=record.column,
        sequences=record.sequences,
        tokens=record.tokens,
    )


def _all_versions(parts: list[Statistics]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for part in parts:
        for package, version in part.metadata.versions.items():
            found.setdefault(package, []).append(version)
    return {package: _joined(versions) or "" for package, versions in found.items()}


def _joined(values: Iterable[str | None]) -> str | None:
    """Return what all values are, or all that they are."""
    distinct = list(dict.fromkeys(value for value in values if value is not None))
    return " + ".join(distinct) if distinct else None
