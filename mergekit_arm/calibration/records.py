"""From what was measured to the records of ``activation_stats.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mergekit_arm.calibration.collect import Site
from mergekit_arm.calibration.corpus import Corpus
from mergekit_arm.calibration.coverage import Coverage
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


def collect_results(
    coverage: Coverage, sites: list[Site], *, subspaces: bool
) -> tuple[dict[str, WeightRecord], dict[str, SiteRecord], Mapping[str, Tensor]]:
    """Return the records of all weights and sites, and the tensors to store."""
    site_of = {
        reading.parameter: site for site in sites for reading in site.plan.readings if site.tokens
    }
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
    records: dict[str, SiteRecord] = {}
    for site in sites:
        if site.tokens:
            finished: dict[str, Tensor] = {}
            for observer in site.observers.values():
                finished |= observer.finish()
            tensors |= {f"{site.name}.{key}": value for key, value in finished.items()}
            records[site.name] = _site_record(site, finished, subspaces)
    return weights, records, tensors


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


def _hash(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()
