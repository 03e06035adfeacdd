"""Held-out data as token sequences: text in full, of chats the answers only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_arm.data.blocks import build_corpus, recognise
from mergekit_arm.data.chats import render, tokenise_rendered
from mergekit_arm.data.formats import RowFormat, Unusable
from mergekit_arm.data.rows import in_order, load_rows
from mergekit_arm.errors import InputError
from mergekit_arm.judging.sets import HeldOutSet

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position whose token is not scored, as in ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True)
class ScoredSequence:
    """One sequence; token ``i`` is scored where ``scored[i]``, given all tokens before it."""

    ids: Tensor
    """int64, one dimension."""
    scored: Tensor
    """bool, of the same length; never true at 0."""


@dataclass(frozen=True)
class HeldOut:
    """What models are judged by: the same tokens for all of them."""

    sequences: list[ScoredSequence]
    answers_only: bool

    @property
    def scored_tokens(self) -> int:
        return sum(int(sequence.scored.sum()) for sequence in self.sequences)

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens, and of which are scored."""
        found = hashlib.sha256()
        for sequence in self.sequences:
            found.update(len(sequence.ids).to_bytes(8, "little"))
            found.update(sequence.ids.numpy().tobytes())
            found.update(sequence.scored.numpy().tobytes())
        return found.hexdigest()

    def batches(
        self, *, elements: int, width: int, batch_size: int | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (ids, attention mask, labels), each (sequences, length), padded at the right.

        A batch has ``batch_size`` sequences; by default as many as keep length · ``width`` (what
        the model makes of one token) within ``elements``, and one at least. Longest first, so
        that little is wasted and memory is at its peak at once.
        """
        waiting = sorted(self.sequences, key=lambda s: -len(s.ids))
        while waiting:
            length = len(waiting[0].ids)
            rows = batch_size or max(1, elements // (width * length))
            batch, waiting = waiting[:rows], waiting[rows:]
            ids = torch.zeros(len(batch), length, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            labels = torch.full_like(ids, IGNORED)
            for row, sequence in enumerate(batch):
                size = len(sequence.ids)
                ids[row, :size] = sequence.ids
                mask[row, :size] = 1
                labels[row, :size] = sequence.ids.where(sequence.scored, IGNORED)
            yield ids, mask, labels


def load_heldout(settings: HeldOutSet, tokenizers: list[PreTrainedTokenizerBase]) -> HeldOut:
    """Read and tokenise the held-out data.

    ``tokenizers``: the base's, then others that may be used where it has no chat template.

    Raises:
        InputError: no data, no usable column, no tokenizer, or a template that cannot be cut.
    """
    rows, split = load_rows(settings.dataset, settings.subset, settings.split)
    form = recognise(rows, settings.text_column, settings.seed)
    if form.kind == "chat":
        held = HeldOut(_chat_sequences(rows, form, settings, tokenizers), True)
    else:
        corpus = build_corpus(
            rows,
            tokenizers[0] if tokenizers else None,
            split=split,
            column=settings.text_column,
            samples=settings.samples,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
        )
        held = whole_text(corpus.blocks)
    if held.scored_tokens == 0:
        remedy = "give longer rows"
        if held.answers_only:
            remedy = "no row has a message of the role assistant that answers another"
        raise InputError(f"no token of the data can be scored: {remedy}")
    return held


def whole_text(blocks: Iterable[Tensor]) -> HeldOut:
    """Return held-out data of token ids (one dimension each), all scored but each block's first."""
    return HeldOut([ScoredSequence(ids, torch.arange(len(ids)) > 0) for ids in blocks], False)


def _chat_sequences(
    rows: Dataset | IterableDataset,
    form: RowFormat,
    settings: HeldOutSet,
    tokenizers: list[PreTrainedTokenizerBase],
) -> list[ScoredSequence]:
    tokenizer = next((one for one in tokenizers if one.chat_template), None)
    if tokenizer is None:
        raise InputError(
            f"column {form.column!r} holds {form.title}, and neither the base nor the "
            "checkpoint has a chat template; give rows of text, or a base whose tokenizer has one"
        )
    found: list[ScoredSequence] = []
    for row in in_order(rows, settings.seed, list(form.columns)):
        if len(found) >= settings.samples:
            break
        try:
            chat = form.read(row)
        except Unusable:
            continue
        found.extend(_answers(chat, tokenizer, settings.sequence_length))
    return found[: settings.samples]


def _answers(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, longest: int
) -> Iterator[ScoredSequence]:
    """Yield a sequence for each answer of a chat: the conversation up to it, the answer scored.

    One for each, since templates may render an answer differently once the talk has gone on
    (reasoning is dropped). Sequences too long keep their end; an answer that alone is too long
    keeps its beginning.
    """
    for index, message in enumerate(messages):
        if index == 0 or message.get("role") != "assistant":
            continue
        prompt = _render(messages[:index], tokenizer, generate=True)
        whole = _render(messages[: index + 1], tokenizer, generate=False)
        # Where they part, the answer begins: also if a token spans the boundary.
        start = next(
            (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
            min(len(prompt), len(whole)),
        )
        start = max(start, 1)
        if start >= len(whole):
            continue
        end = min(len(whole), start + longest - 1)
        first = max(0, end - longest)
        ids = torch.tensor(whole[first:end], dtype=torch.int64)
        yield ScoredSequence(ids, torch.arange(first, end) >= start)


def _render(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, generate: bool
) -> list[int]:
    try:
        text = render(tokenizer, messages, generate=generate)
    except ValueError as error:
        raise InputError(f"the chat template refuses a row: {error}") from error
    return tokenise_rendered(tokenizer, [text])[0]
