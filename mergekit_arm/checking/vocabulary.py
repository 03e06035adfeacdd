"""Tokenizers: whether mergekit can build the one that is asked for, and bring tensors to it."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.tokenizer import TokenizerInfo
from mergekit.tokenizer.build import build_tokenizer
from mergekit.tokenizer.config import ModelTokenEmbedding, TokenEmbeddingConfig

from mergekit_arm.checking.findings import Findings
from mergekit_arm.checking.models import Model
from mergekit_arm.checking.planning import Planned, quiet
from mergekit_arm.errors import InputError, first_line
from mergekit_arm.merging.documents import check_chat_template

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def builds_tokenizer(config: MergeConfiguration) -> bool:
    """Say whether mergekit builds a tokenizer for the merge."""
    return config.tokenizer is not None or config.tokenizer_source is not None


def check_vocabulary(
    config: MergeConfiguration,
    models: Mapping[ModelReference, Model],
    planned: Sequence[Planned],
    findings: Findings,
    *,
    trust_remote_code: bool,
) -> None:
    """Find what keeps mergekit from the tokenizer that is asked for, or from its tensors."""
    try:
        check_chat_template(config.chat_template)
    except InputError as error:
        findings.error(("chat_template",), error.message.partition(": ")[2])
    if not builds_tokenizer(config):
        _note_absent(config, models, findings)
        return
    place = ("tokenizer",) if config.tokenizer else ("tokenizer_source",)
    settings = (config.tokenizer.tokens or {}) if config.tokenizer else {}
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    try:
        # What it says on its way, and its bar, would stand between the findings.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            built = build_tokenizer(
                config.base_model, config.referenced_models(), source, trust_remote_code,
                list(settings),
            )  # fmt: skip
    except Exception as error:  # whatever the tokenizers' libraries raise
        findings.error(place, f"mergekit cannot build the tokenizer: {first_line(error)}")
        return
    for one in planned:
        axis = one.weight.vocabulary_axis
        if one.task is None or axis is None:
            continue
        rows = {}
        for model, weight in one.inputs.items():
            header = models[model].headers.get(weight.name)
            if header is not None and axis < len(header.shape):
                rows[model] = header.shape[axis]
        for problem in _row_problems(built, rows):
            findings.error(place, f"{one.weight.name}: {problem}")
        for token, embedding in settings.items():
            said = _token_problem(built, rows, token, embedding)
            if said:
                findings.error(("tokenizer", "tokens", token), f"{one.weight.name}: {said}")


def _note_absent(
    config: MergeConfiguration, models: Mapping[ModelReference, Model], findings: Findings
) -> None:
    donor = models.get(config.base_model) if config.base_model else None
    if donor is None or donor.folder is None:
        return
    if not any(os.path.exists(donor.folder / name) for name in _TOKENIZER_FILES):
        findings.note(("base_model",), "has no tokenizer, so that the merged model gets none")


def _row_problems(built: TokenizerInfo, rows: Mapping[ModelReference, int]) -> list[str]:
    """Say which model's rows the tokenizer's ids do not fit."""
    problems = []
    vocabulary = built.tokenizer.get_vocab()
    for model, count in rows.items():
        known = built.permutations[model]
        lacking = [token for token, index in vocabulary.items() if index not in known]
        beyond = [token for token, index in vocabulary.items() if known.get(index, -1) >= count]
        for token in (lacking + beyond)[:1]:
            problems.append(
                f"token {token!r} has an id beyond the {count} rows of {model}: that model's "
                "tokenizer does not fit its weights"
            )
    return problems


def _token_problem(
    built: TokenizerInfo,
    rows: Mapping[ModelReference, int],
    token: str,
    embedding: TokenEmbeddingConfig,
) -> str | None:
    """Say why a token cannot have the embedding that is asked for."""
    index = built.tokenizer.get_vocab()[token]
    missing = any(built.permutations[model].get(index, -1) < 0 for model in rows)
    source = embedding.source
    if not (missing or embedding.force) or getattr(source, "kind", None) == "zero":
        return None
    if source is None:
        return "it has no source, and not every model has it: name one" if missing else None
    model = source.model if isinstance(source, ModelTokenEmbedding) else source
    if model not in rows:
        return f"its source {model} is no input of this merge"
    if not isinstance(source, ModelTokenEmbedding):
        known = built.permutations[model].get(index, -1) >= 0
        return None if known else f"its source {model} has no such token"
    number = source.token_id
    if number is None:
        vocabulary = built.original_vocabs.get(model, {})
        if source.token not in vocabulary:
            return f"its source {model} has no token {source.token!r}"
        number = vocabulary[source.token]
    if not 0 <= number < rows[model]:
        return f"its source {model} has no token id {number}"
    return None
