"""One calibration from start to end: check, load, measure, write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mergekit_arm.calibration.corpus import Corpus, build_corpus, load_rows
from mergekit_arm.calibration.coverage import cover_checkpoint
from mergekit_arm.calibration.measure import Progress, measure
from mergekit_arm.calibration.model import (
    Source,
    choose_device,
    choose_dtype,
    find_model,
    load_model,
    load_tokenizer,
    open_checkpoint,
)
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.records import collect_results, data_record, settings_record
from mergekit_arm.calibration.sites import plan_readings
from mergekit_arm.errors import InputError
from mergekit_arm.reports.card import statistics_card
from mergekit_arm.statistics.format import Metadata, ModelRecord
from mergekit_arm.statistics.store import check_destination, write_statistics

__all__ = ["CalibrationOptions", "CalibrationResult", "calibrate"]

_RECORDED_VERSIONS = ("mergekit-arm", "mergekit", "torch", "transformers", "datasets", "tokenizers")


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
        sites, seconds = measure(model, coverage, corpus, options, progress)
        weights, site_records, tensors = collect_results(
            coverage, sites, subspaces="subspace" in options.statistics
        )
        metadata = Metadata(
            model=ModelRecord(
                reference=options.model,
                revision=source.commit,
                architecture=type(model).__name__,
                content_hash=coverage.content_hash(),
            ),
            data=data_record(options, corpus, tokenizer),
            settings=settings_record(options, device, dtype),
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
