"""From what was measured to the records of ``activation_stats.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mergekit_arm.calibration.collect import Site
from mergekit_arm.calibration.corpus import Corpus
from mergekit_arm.calibration.coverage import Coverage
from mergekit_arm.calibration.job import Job
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.sites import SitePlan
from mergekit_arm.statistics.format import (
    NEVER_USED,
    DataRecord,
    SettingsRecord,
    SiteRecord,
    WeightRecord,
)
from mergekit_arm.statistics.store import PROBES


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


def finish_site(site: Site, *, subspaces: bool) -> MeasuredSite:
    """Turn the sums of a site that has seen tokens into what is stored."""
    tensors: dict[str, Tensor] = {}
    for observer in site.observers.values():
        tensors |= observer.finish()
    parameters = [reading.parameter for reading in site.plan.readings]
    return MeasuredSite(site.name, parameters, _site_record(site, tensors, subspaces), tensors)


def add_up(
    sites: Iterable[Site], job: Job, device: torch.device, *, subspaces: bool
) -> list[MeasuredSite]:
    """Sum the sites over all processes, each of which calls this, and finish them on the first.

    Sites that no process saw an input of are left out. The sums of this process stay what they
    are: should another die now, they are what must be saved.
    """
    measured = []
    for site in sites:
        if job.processes > 1:
            site.prepare(device)
            own, site = site, Site(site.name, site.plan, site.statistics)
            site.load_state({k: job.total(v.to(device)) for k, v in own.state().items()})
        if site.tokens and job.main:
            site.prepare(device)
            measured.append(finish_site(site, subspaces=subspaces))
    return measured


def collect_results(
    coverage: Coverage, measured: Iterable[MeasuredSite]
) -> tuple[dict[str, WeightRecord], dict[str, SiteRecord], Mapping[str, Tensor]]:
    """Return the records of all weights and sites, and the tensors to store."""
    measured = list(measured)
    site_of = {parameter: site for site in measured for parameter in site.parameters}
    weights: dict[str, WeightRecord] = {}
    for row, weight in enumerate(coverage.weights):
        site = site_of.get(weight.parameter) if weight.parameter else None
        reading = coverage.readings.get(weight.parameter) if weight.parameter else None
        weights[weight.name] = WeightRecord(
            shape=list(weight.shape),
            dtype=weight.dtype,
            probe=row,
            site=site.name if site else None,
            input_axis=reading.input_axis if site and reading else None,
            reason=None if site else weight.reason or NEVER_USED,
        )
    tensors = {PROBES: coverage.probes}
    for site in measured:
        tensors |= {f"{site.name}.{key}": value for key, value in site.tensors.items()}
    return weights, {site.name: site.record for site in measured}, tensors


def _site_record(site: Site, finished: Mapping[str, Tensor], subspaces: bool) -> SiteRecord:
    if "basis" in finished:
        energy = float(finished["eigenvalues"].double().sum() / finished["trace"])
        return SiteRecord(
            width=site.plan.width,
            tokens=site.tokens,
            subspace=finished["basis"].shape[1],
            energy=round(min(energy, 1.0), 6) if energy == energy else None,
        )
    matrix = any(reading.matrix for reading in site.plan.readings)
    reason = "output head" if matrix else "norms only"
    return SiteRecord(
        width=site.plan.width, tokens=site.tokens, no_subspace=reason if subspaces else None
    )


def data_record(
    options: CalibrationOptions, corpus: Corpus, tokenizer: PreTrainedTokenizerBase | None
) -> DataRecord:
    """Return what the data was and how it was cut."""
    return DataRecord(
        dataset=options.dataset,
        subset=options.subset,
        split=corpus.split,
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
