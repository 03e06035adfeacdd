"""From what was measured to the records of ``activation_stats.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mergekit_arm.calibration.collect import Site
from mergekit_arm.calibration.corpus import Corpus
from mergekit_arm.calibration.coverage import Coverage, CoveredWeight
from mergekit_arm.calibration.job import Job
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.sites import SitePlan
from mergekit_arm.errors import InputError
from mergekit_arm.statistics.format import (
    EXPERTS,
    NEVER_USED,
    NO_TOKEN,
    ONE_EXPERT,
    DataRecord,
    SettingsRecord,
    SiteRecord,
    WeightRecord,
)
from mergekit_arm.statistics.store import PROBES, ROWS

PARTS = "\x1f"
"""Between a site's name and the key of one of its tensors; in neither."""


def site_name(plan: SitePlan) -> str:
    """Return the name of a site: the first layer that reads there."""
    return plan.readings[0].parameter.removesuffix(".weight")


@dataclass(frozen=True)
class MeasuredSite:
    """A site whose sums are complete, as a directory stores it."""

    name: str
    parameters: list[str]
    """What reads there."""
    record: SiteRecord
    tensors: Mapping[str, Tensor]
    """By key, without the site's name."""


def add_up(
    sites: Iterable[Site], job: Job, device: torch.device, *, subspaces: bool
) -> list[MeasuredSite]:
    """Sum the sites over all processes, each of which calls this; return them on the first.

    Each process finishes its share, one site at a time, so that beside its own sums it holds the
    totals of two sites at most. Its own stay what they are: should a process die now, they are
    what must be saved. Sites that no process saw an input of are left out.
    """
    shares: dict[int, list[Site]] = {}
    for site in sites:
        shares.setdefault(id(site.plan), []).append(site)
    order = {site_name(group[0].plan): number for number, group in enumerate(shares.values())}
    # Of one width side by side: what is finished at once then takes alike long.
    groups = sorted(shares.values(), key=lambda group: group[0].plan.width)
    measured: list[MeasuredSite] = []
    for first in range(0, len(groups), job.processes):
        mine: list[Site] = []
        for process, group in enumerate(groups[first : first + job.processes]):
            total = [_total(site, job, device) for site in group]
            if process == job.process:
                mine = total
        seen = any(site.tokens for site in mine)
        finished = [finish_site(mine, device, subspaces=subspaces)] if seen else []
        measured += _collect(finished, job)
    return sorted(measured, key=lambda site: order[site.name])


def _total(site: Site, job: Job, device: torch.device) -> Site:
    """Return the site with the sums of all processes."""
    if job.processes == 1:
        return site
    site.prepare(device)
    total = Site(site.name, site.plan, site.statistics, site.expert)
    total.load_state({key: job.total(value.to(device)) for key, value in site.state().items()})
    return total


def _collect(finished: list[MeasuredSite], job: Job) -> list[MeasuredSite]:
    """Return the sites of all processes, in their order, on the first; none on the others."""
    if job.processes == 1:
        return finished
    tensors, record = pack(finished)
    records = job.collect(json.dumps(record).encode())
    return [
        site
        for packed, record in zip(job.collect(save(tensors)), records, strict=True)
        for site in unpack(load(packed), json.loads(record))
    ]


def pack(sites: Iterable[MeasuredSite]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the sites as tensors, on the CPU, and a record for JSON; ``unpack`` reverses it."""
    sites = list(sites)
    tensors = {
        f"{site.name}{PARTS}{key}": value.cpu().contiguous()
        for site in sites
        for key, value in site.tensors.items()
    }
    return tensors, {site.name: [site.parameters, site.record.model_dump()] for site in sites}


def unpack(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> list[MeasuredSite]:
    """Return the sites that ``pack`` was given."""
    return [
        MeasuredSite(
            name,
            parameters,
            SiteRecord.model_validate(found),
            {
                key.removeprefix(f"{name}{PARTS}"): value
                for key, value in tensors.items()
                if key.startswith(f"{name}{PARTS}")
            },
        )
        for name, (parameters, found) in record.items()
    ]


def finish_site(shares: list[Site], device: torch.device, *, subspaces: bool) -> MeasuredSite:
    """Turn sums into what is stored: of one input, or stacked, of one for each expert."""
    finished: list[dict[str, Tensor]] = []
    for share in shares:
        share.prepare(device)
        one: dict[str, Tensor] = {}
        for observer in share.observers.values():
            one |= observer.finish()
        finished.append(one)
    plan, tensors = shares[0].plan, finished[0]
    if plan.experts is not None:
        tensors = {key: torch.stack([one[key] for one in finished]) for key in tensors}
    parameters = [reading.parameter for reading in plan.readings]
    record = _site_record(shares, tensors, subspaces)
    return MeasuredSite(site_name(plan), parameters, record, tensors)


@dataclass(frozen=True)
class Results:
    """The records of a run, and the tensors to store."""

    weights: dict[str, WeightRecord]
    converted: dict[str, WeightRecord]
    aliases: dict[str, str]
    sites: dict[str, SiteRecord]
    tensors: dict[str, Tensor]


def collect_results(coverage: Coverage, measured: Iterable[MeasuredSite], rows: Tensor) -> Results:
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
    return Results(
        weights={weight.name: records[weight.name] for weight in coverage.weights},
        converted={weight.name: records[weight.name] for weight in coverage.converted},
        aliases=dict(sorted(coverage.aliases.items())),
        sites={one.name: one.record for one in measured},
        tensors=tensors,
    )


def _unused(weight: CoveredWeight, routed: set[str]) -> str:
    """Say why nothing was measured: ``routed`` are lists of experts of which some were used."""
    experts = [ONE_EXPERT.match(part.parameter) for part in weight.parts]
    if all(one is not None and one["experts"] in routed for one in experts):
        return NO_TOKEN
    return NEVER_USED


def _site_record(shares: list[Site], finished: Mapping[str, Tensor], subspaces: bool) -> SiteRecord:
    plan = shares[0].plan
    tokens = shares[0].tokens if plan.experts is None else [share.tokens for share in shares]
    if "basis" in finished:
        energy = float(finished["eigenvalues"].double().sum() / finished["trace"])
        return SiteRecord(
            width=plan.width,
            tokens=tokens,
            subspace=finished["basis"].shape[1],
            energy=round(min(energy, 1.0), 6) if energy == energy else None,
        )
    matrix = any(reading.matrix for reading in plan.readings)
    reason = "norms only" if not matrix else "output head" if plan.experts is None else EXPERTS
    return SiteRecord(width=plan.width, tokens=tokens, no_subspace=reason if subspaces else None)


def data_record(
    options: CalibrationOptions, corpus: Corpus, tokenizer: PreTrainedTokenizerBase | None
) -> DataRecord:
    """Return what the data was and how it was cut."""
    return DataRecord(
        dataset=options.dataset,
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
    )


def settings_record(
    options: CalibrationOptions, device: torch.device, dtype: torch.dtype
) -> SettingsRecord:
    """Return the settings that change a run's numbers."""
    subspace = "subspace" in options.statistics
    return SettingsRecord(
        statistics=list(options.statistics),
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        min_expert_tokens=options.min_expert_tokens,
        rank=options.rank if subspace else None,
        energy=options.energy if subspace else None,
        subspace_tokens=options.subspace_tokens if subspace else None,
        skip_first=options.skip_first,
    )


def fingerprint(data: DataRecord, settings: SettingsRecord, content: str) -> dict[str, str]:
    """Return what decides a run's numbers, by names that a user knows.

    ``content`` is the hash of the model's content.
    """
    facts = {"model": f"content {content[:16]}"}
    facts["data"] = f"{data.sequences} sequences, {data.tokens} tokens ({data.content_hash[:16]})"
    facts["seed"] = str(data.seed)
    for name, value in settings.model_dump().items():
        facts[name.replace("_", " ")] = ", ".join(value) if isinstance(value, list) else str(value)
    return facts


def _hash(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()
