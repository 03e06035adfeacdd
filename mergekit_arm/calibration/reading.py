"""The data that the options name: read with the tokenizer they name, and checked for the model."""

from __future__ import annotations

from collections.abc import Callable

from mergekit.common import ModelReference
from transformers import PreTrainedTokenizerBase

from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.data.blocks import Corpus
from mergekit_arm.data.chats import read_template
from mergekit_arm.data.corpus import read_corpus
from mergekit_arm.data.tokens import NeedsTokenizer
from mergekit_arm.errors import InputError
from mergekit_arm.models.loading import Source, choose_device, find_model
from mergekit_arm.models.tokenizer import load_own_tokenizer


def read_data(
    options: CalibrationOptions, source: Source, say: Callable[[str], None]
) -> tuple[Corpus, PreTrainedTokenizerBase | None]:
    """Read the data, refuse what the model does not take, and say what was left out.

    Returns the token blocks and the tokenizer that made them, None where there is none.

    Raises:
        InputError: data that cannot be read or used, sequences that are too long, or token ids
            beyond the vocabulary.
    """
    tokenizer, broken = None, None
    try:
        tokenizer = choose_tokenizer(options)
    except InputError as error:
        if options.tokenizer is not None or options.chat_template is not None:
            raise
        broken = error  # rows of token ids need none
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    try:
        corpus = read_corpus(options.data(), tokenizer, longest=longest)
    except NeedsTokenizer as error:
        raise broken or error from error
    if corpus.noteworthy or options.dry_run:
        for note in corpus.notes:
            say(note)
    if len(corpus.blocks) < corpus.requested:
        say(
            f"{len(corpus.blocks)} sequences, not {corpus.requested}: the data holds no more. "
            "Give more data, or fewer --samples."
        )
    if options.dry_run and corpus.excerpt:
        say(f"The first block begins: {corpus.excerpt!r}")
    _check_fit(corpus, source, longest)
    return corpus, tokenizer


def check_calibration(options: CalibrationOptions) -> None:
    """Refuse what a calibration would refuse before its first forward pass, as far as it is quick.

    The data are read as the calibration will; of base+adapter, the base's configuration.

    Raises:
        InputError: no such device, no such model, or data that cannot be used.
    """
    choose_device(options.device)
    model = str(ModelReference.parse(options.model).model)
    with find_model(model, trust_remote_code=options.trust_remote_code) as source:
        read_data(options, source, lambda _note: None)


def choose_tokenizer(options: CalibrationOptions) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that the options name, or the model's own, with their chat template.

    None where the model has none and none is named.

    Raises:
        InputError: none where one is named or needed for a template, or no such template.
    """
    named = options.tokenizer
    tokenizer = load_own_tokenizer(named or options.model, options.trust_remote_code)
    if tokenizer is None and named is not None:
        raise InputError(f"--tokenizer {named}: no tokenizer there; name a directory or a Hub id")
    if options.chat_template is not None:
        template = read_template(options.chat_template)
        if tokenizer is None:
            raise InputError(
                "--chat-template needs a tokenizer and the model has none: add --tokenizer "
                "MODEL_OR_DIR"
            )
        tokenizer.chat_template = template
    return tokenizer


def _check_fit(corpus: Corpus, source: Source, longest: int | None) -> None:
    length = max(corpus.lengths)
    if longest and length > longest:
        raise InputError(
            f"sequences of {length} tokens, but {source.reference} takes {longest}: "
            f"use --sequence-length {longest}"
        )
    highest = max(int(block.max()) for block in corpus.blocks)
    lowest = min(int(block.min()) for block in corpus.blocks)
    vocabulary = getattr(source.config.get_text_config(), "vocab_size", None)
    if lowest < 0 or (vocabulary and highest >= vocabulary):
        raise InputError(
            f"token ids from {lowest} to {highest}, but {source.reference} has a vocabulary of "
            f"{vocabulary}: the data was made with another tokenizer"
        )
