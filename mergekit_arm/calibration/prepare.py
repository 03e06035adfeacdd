"""Everything that is refused before the first forward pass, and what is loaded for it."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.processes import Job
from mergekit_arm.data.blocks import Corpus
from mergekit_arm.data.chats import read_template
from mergekit_arm.data.corpus import read_corpus
from mergekit_arm.errors import InputError
from mergekit_arm.models.loading import Source, load_own_tokenizer, load_tokenizer


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


def _read_corpus(
    options: CalibrationOptions, source: Source, say: Callable[[str], None]
) -> tuple[Corpus, PreTrainedTokenizerBase | None]:
    """Read the data with the tokenizer that the options name, and say how."""
    tokenizer = choose_tokenizer(options, lambda: load_tokenizer(source))
    corpus = read_corpus(options.data(), tokenizer, longest=_positions(source))
    if corpus.incomplete or corpus.mixture or options.dry_run:
        for note in corpus.notes:
            say(note)
    if options.dry_run and corpus.excerpt:
        say(f"The first block begins: {corpus.excerpt!r}")
    return corpus, tokenizer


def choose_tokenizer(
    options: CalibrationOptions, own: Callable[[], PreTrainedTokenizerBase | None]
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that the options name, or the model's ``own``, with their template.

    Raises:
        InputError: there is none where one is named, or no template.
    """
    if options.tokenizer is None:
        tokenizer = own()
    else:
        tokenizer = load_own_tokenizer(options.tokenizer, options.trust_remote_code)
        if tokenizer is None:
            raise InputError(f"--tokenizer {options.tokenizer}: there is no tokenizer to be found")
    if options.chat_template is not None:
        if tokenizer is None:
            raise InputError(
                "--chat-template needs a tokenizer and the model has none: add --tokenizer"
            )
        tokenizer.chat_template = read_template(options.chat_template)
    return tokenizer


def _positions(source: Source) -> int | None:
    """Return how many tokens a sequence may have, where the model says so."""
    return getattr(source.config.get_text_config(), "max_position_embeddings", None)


def _check_corpus(corpus: Corpus, source: Source, say: Callable[[str], None]) -> None:
    if len(corpus.blocks) < corpus.requested:
        say(
            f"{len(corpus.blocks)} sequences, not {corpus.requested}: the data holds no more. "
            "Give more data, or fewer --samples."
        )
    config = source.config.get_text_config()
    limit = _positions(source)
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
