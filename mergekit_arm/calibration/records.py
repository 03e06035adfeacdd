"""From what was measured to the records of ``activation_stats.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mergekit_arm.calibration.inputs.coverage import Coverage, CoveredWeight
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.sums.sites import chosen_kinds
from mergekit_arm.calibration.sums.totals import MeasuredSite
from mergekit_arm.data.blocks import Corpus
from mergekit_arm.data.settings import RECIPES, parse_share
from mergekit_arm.errors import InputError
from mergekit_arm.statistics.format import (
    NEVER_USED,
    NO_TOKEN,
    ONE_EXPERT,
    DataRecord,
    SettingsRecord,
    SiteRecord,
    WeightRecord,
)
from mergekit_arm.statistics.kinds.base import Kind
from mergekit_arm.statistics.kinds.site import measured_widths, merge_fields
from mergekit_arm.statistics.write import PROBES, ROWS


@dataclass(frozen=True)
class Results:
    """The records of a run, and the tensors to store."""

    weights: dict[str, WeightRecord]
    converted: dict[str, WeightRecord]
    aliases: dict[str, str]
    sites: dict[str, SiteRecord]
    tensors: dict[str, Tensor]


def collect_results(
    coverage: Coverage, measured: Iterable[MeasuredSite], rows: Tensor, kinds: Iterable[Kind]
) -> Results:
    """Return the records of all weights and sites, and the tensors to store.

    Raises:
        InputError: a tensor of the checkpoint was split into weights that read unlike inputs.
    """
    measured = list(measured)
    site_of = {parameter: site.name for site in measured for parameter in site.parameters}
    routed = {found["experts"] for name in site_of if (found := ONE_EXPERT.match(name))}
    records: dict[str, WeightRecord] = {}
    for row, weight in enumerate((*coverage.weights, *coverage.converted)):
        site = None
        if weight.reason is None:
            inputs = {site_of.get(part.parameter) for part in weight.parts}
            if len(inputs) > 1:
                parameters = " and ".join(part.parameter for part in weight.parts)
                raise InputError(
                    f"{weight.name} is split into {parameters}, which read unlike inputs: this "
                    "architecture is not supported"
                )
            site = inputs.pop()
        records[weight.name] = WeightRecord(
            shape=list(weight.shape),
            dtype=weight.dtype,
            probe=row,
            site=site,
            input_axis=weight.input_axis if site else None,
            row=weight.row if site else None,
            reason=None if site else weight.reason or _unused(weight, routed),
        )
    tensors: dict[str, Tensor] = {PROBES: coverage.probes, ROWS: rows}
    for one in measured:
        tensors |= {f"{one.name}.{key}": value for key, value in one.tensors.items()}
    sites = {one.name: one.record for one in measured}
    for kind in kinds:
        for width in sorted(measured_widths(kind, sites.values())):
            tensors |= kind.make_shared(width)
    return Results(
        weights={weight.name: records[weight.name] for weight in coverage.weights},
        converted={weight.name: records[weight.name] for weight in coverage.converted},
        aliases=dict(sorted(coverage.aliases.items())),
        sites=sites,
        tensors=tensors,
    )


def _unused(weight: CoveredWeight, routed: set[str]) -> str:
    """Say why nothing was measured: ``routed`` are lists of experts of which some were used."""
    experts = [ONE_EXPERT.match(part.parameter) for part in weight.parts]
    if all(one is not None and one["experts"] in routed for one in experts):
        return NO_TOKEN
    return NEVER_USED


def data_record(
    options: CalibrationOptions, corpus: Corpus, tokenizer: PreTrainedTokenizerBase | None
) -> DataRecord:
    """Return what the data was and how it was cut."""
    return DataRecord(
        dataset=" + ".join(one.dataset for one in corpus.mixture)
        or parse_share(options.data().datasets[0]).name,
        subset=options.subset,
        split=corpus.split,
        part=options.part,
        column=corpus.column,
        template_hash=corpus.template_hash,
        tokenizer_hash=None if corpus.ready_ids or tokenizer is None else _hash(tokenizer),
        seed=options.seed,
        sequence_length=None if corpus.ready_ids else options.sequence_length,
        sequences=len(corpus.blocks),
        tokens=corpus.tokens,
        content_hash=corpus.content_hash(),
        max_tokens_per_row=options.max_tokens_per_row,
        recipe=None if options.recipe == RECIPES[0] else options.recipe,
        tokenizer=options.tokenizer,
        mixture=list(corpus.mixture) or None,
    )


def settings_record(
    options: CalibrationOptions, device: torch.device, dtype: torch.dtype
) -> SettingsRecord:
    """Return the settings that change a run's numbers."""
    kinds = chosen_kinds(options)
    return SettingsRecord(
        statistics=[kind.name for kind in kinds],
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        min_expert_tokens=options.min_expert_tokens,
        skip_first=options.skip_first,
        **merge_fields(kind.to_record(kind.settings()) for kind in kinds),
    )


def fingerprint(data: DataRecord, settings: SettingsRecord, content: str) -> dict[str, str]:
    """Return what decides a run's numbers, by names that a user knows.

    ``content`` is the hash of the model's content.
    """
    facts = {"model": f"content {content[:16]}"}
    facts["data"] = f"{data.sequences} sequences, {data.tokens} tokens ({data.content_hash[:16]})"
    facts["seed"] = str(data.seed)
    for name, value in settings.model_dump(exclude={"kinds"}).items():
        facts[name.replace("_", " ")] = ", ".join(value) if isinstance(value, list) else str(value)
    for kind, own in (settings.kinds or {}).items():
        facts |= {f"{kind} {name.replace('_', ' ')}": str(value) for name, value in own.items()}
    return facts


def _hash(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()
