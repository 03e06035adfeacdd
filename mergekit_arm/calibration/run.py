"""One calibration from start to end: check, load, measure, write."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mergekit_arm.calibration.collect import OBSERVERS, Collector, Site, without_logits
from mergekit_arm.calibration.corpus import DEFAULT_DATASET, Corpus, build_corpus, load_rows
from mergekit_arm.calibration.coverage import Coverage, cover_checkpoint
from mergekit_arm.calibration.model import (
    Source,
    choose_device,
    choose_dtype,
    find_model,
    load_model,
    load_tokenizer,
    open_checkpoint,
)
from mergekit_arm.calibration.sites import SitePlan, plan_readings, share_sites
from mergekit_arm.errors import InputError
from mergekit_arm.reports.card import statistics_card
from mergekit_arm.statistics.format import (
    NEVER_USED,
    DataRecord,
    Metadata,
    ModelRecord,
    SettingsRecord,
    SiteRecord,
    WeightRecord,
)
from mergekit_arm.statistics.store import PROBES, check_destination, write_statistics

Progress = Callable[[int, int], None]
"""Called after every batch with tokens done and tokens in all."""

_DISCOVERY_TOKENS = 16
_TOKENS_PER_BATCH = 4096
_RECORDED_VERSIONS = ("mergekit-arm", "mergekit", "torch", "transformers", "datasets", "tokenizers")


@dataclass(frozen=True)
class CalibrationOptions:
    """Everything that ``mergekit-arm calibrate`` can be told; see its ``--help``."""

    model: str
    out: str
    dataset: str = DEFAULT_DATASET
    subset: str | None = None
    split: str | None = None
    text_column: str | None = None
    samples: int = 256
    sequence_length: int = 512
    batch_size: int | None = None
    seed: int = 42
    device: str = "auto"
    dtype: str = "auto"
    statistics: tuple[str, ...] = ("importance",)
    trust_remote_code: bool = False
    lora_merge_cache: str | None = None
    force: bool = False


@dataclass(frozen=True)
class CalibrationResult:
    """What was written, for reports."""

    out: Path
    metadata: Metadata
    requested_sequences: int
    seconds: float


def calibrate(
    options: CalibrationOptions,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> CalibrationResult:
    """Measure ``options.model`` and write a statistics directory to ``options.out``.

    Holds the model, one batch of activations and one set of sums per site. ``say`` receives
    one-line notes for the user, ``progress`` every batch.

    Raises:
        InputError: anything that cannot work, found before the first forward pass.
        Failure: a NaN or an infinity in an activation.
    """
    out = Path(options.out)
    check_destination(out, options.force)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    with find_model(
        options.model,
        trust_remote_code=options.trust_remote_code,
        lora_cache=options.lora_merge_cache,
    ) as source:
        tokenizer = load_tokenizer(source)
        corpus = _read_corpus(options, tokenizer)
        _check_corpus(corpus, source, say or (lambda note: None))
        model = load_model(source, device, dtype)
        coverage = cover_checkpoint(model, open_checkpoint(source), plan_readings(model))
        seconds, sites = _measure(model, coverage, corpus, options, progress)
        weights, site_records, tensors = _collect_results(coverage, sites)
        metadata = Metadata(
            model=ModelRecord(
                reference=options.model,
                revision=source.commit,
                architecture=type(model).__name__,
                content_hash=coverage.content_hash(),
            ),
            data=_data_record(options, corpus, tokenizer),
            settings=SettingsRecord(
                statistics=list(options.statistics),
                dtype=str(dtype).removeprefix("torch."),
                device=device.type,
            ),
            versions={package: version(package) for package in _RECORDED_VERSIONS},
            sites=site_records,
            weights=weights,
        )
        write_statistics(
            out, metadata, tensors, statistics_card(metadata, out.name), force=options.force
        )
    return CalibrationResult(out, metadata, corpus.requested, seconds)


def _read_corpus(options: CalibrationOptions, tokenizer: PreTrainedTokenizerBase | None) -> Corpus:
    rows, split = load_rows(options.dataset, options.subset, options.split)
    if len(rows) == 0:
        raise InputError(f"data set {options.dataset!r} is empty")
    return build_corpus(
        rows,
        tokenizer,
        split=split,
        column=options.text_column,
        samples=options.samples,
        sequence_length=options.sequence_length,
        seed=options.seed,
    )


def _check_corpus(corpus: Corpus, source: Source, say: Callable[[str], None]) -> None:
    if len(corpus.blocks) < corpus.requested:
        say(
            f"{len(corpus.blocks)} sequences, not {corpus.requested}: the data holds no more. "
            "Give more data, or fewer --samples."
        )
    config = source.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    longest = max(len(block) for block in corpus.blocks)
    if limit and longest > limit:
        remedy = "shorter rows" if corpus.ready_ids else f"--sequence-length {limit}"
        raise InputError(
            f"sequences of {longest} tokens, but {source.reference} takes {limit}: use {remedy}"
        )
    highest = max(int(block.max()) for block in corpus.blocks)
    lowest = min(int(block.min()) for block in corpus.blocks)
    vocabulary = getattr(config, "vocab_size", None)
    if lowest < 0 or (vocabulary and highest >= vocabulary):
        raise InputError(
            f"token ids from {lowest} to {highest}, but {source.reference} has a vocabulary of "
            f"{vocabulary}: the data was made with another tokenizer"
        )


def _measure(
    model: PreTrainedModel,
    coverage: Coverage,
    corpus: Corpus,
    options: CalibrationOptions,
    progress: Progress | None,
) -> tuple[float, list[Site]]:
    device = model.device
    first = corpus.blocks[0][None, :_DISCOVERY_TOKENS].to(device)
    with without_logits(model), torch.inference_mode():
        plans = share_sites(
            {name: coverage.readings[name] for name in coverage.read_parameters},
            lambda: model(input_ids=first) and None,
        )
        factories = {name: OBSERVERS[name] for name in options.statistics}
        sites = [Site(_site_name(plan), plan, factories) for plan in plans]
        batch_size = options.batch_size or max(1, _TOKENS_PER_BATCH // len(corpus.blocks[-1]))
        total, done = corpus.tokens, 0
        started = time.perf_counter()
        with Collector(sites) as collector:
            for batch in corpus.batches(batch_size):
                model(input_ids=batch.to(device))
                collector.check()
                done += batch.numel()
                if progress:
                    progress(done, total)
        return time.perf_counter() - started, sites


def _site_name(plan: SitePlan) -> str:
    return plan.readings[0].parameter.removesuffix(".weight")


def _collect_results(
    coverage: Coverage, sites: list[Site]
) -> tuple[dict[str, WeightRecord], dict[str, SiteRecord], Mapping[str, Tensor]]:
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
    tensors: dict[str, Tensor] = {PROBES: coverage.probes}
    records: dict[str, SiteRecord] = {}
    for site in sites:
        if site.tokens:
            records[site.name] = SiteRecord(width=site.plan.width, tokens=site.tokens)
            for observer in site.observers.values():
                for key, value in observer.finish().items():
                    tensors[f"{site.name}.{key}"] = value
    return weights, records, tensors


def _data_record(
    options: CalibrationOptions, corpus: Corpus, tokenizer: PreTrainedTokenizerBase | None
) -> DataRecord:
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


def _hash(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()
