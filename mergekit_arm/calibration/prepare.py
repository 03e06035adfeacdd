"""Everything that is refused before the first forward pass, and what is loaded for it."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from mergekit_arm.calibration.options import CalibrationOptions, parse_part
from mergekit_arm.calibration.processes import Job
from mergekit_arm.data.blocks import Corpus, build_corpus
from mergekit_arm.data.rows import load_rows
from mergekit_arm.errors import InputError
from mergekit_arm.models.loading import (
    Source,
)


def check_placement(options: CalibrationOptions, job: Job) -> None:
    """Refuse options that contradict each other.

    Raises:
        InputError: they do.
    """
    if options.device_map is not None:
        if options.low_memory:
            raise InputError("--device-map and --low-memory exclude each other: choose one")
        if options.device != "auto":
            raise InputError("--device-map chooses the devices itself: leave --device out")
        if job.local_processes > 1:
            raise InputError(
                "--device-map spreads one process over all devices of a host: "
                "start one process for each host, or leave it out"
            )
    if options.activation_budget != "auto" and not options.low_memory:
        raise InputError("--activation-budget belongs to --low-memory: add that, or leave it out")


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
        part=parse_part(options.part),
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
