"""Rows → their token ids, one row at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from mergekit_arm.data.chats import render, tokenise_rendered
from mergekit_arm.data.counts import LeftOut
from mergekit_arm.data.formats import RowFormat, Unusable
from mergekit_arm.data.packing import Numbered
from mergekit_arm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_AT_ONCE = 64
_CHARACTERS = 32
"""More than tokens have, one with another."""
_LEAST = 100_000
"""Characters that are always read of a row."""


class NeedsTokenizer(InputError):
    """The data is text and there is no tokenizer."""


def row_hash(row: Any) -> int:
    """Return a hash of a row's content: 63 bits, the same on every machine."""
    content = json.dumps(row, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 1


def check_tokenizer(form: RowFormat, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse text without a tokenizer, and chats without a template.

    Raises:
        NeedsTokenizer: with the options that help.
        InputError: likewise.
    """
    if tokenizer is None:
        raise NeedsTokenizer(
            f"column {form.column!r} needs a tokenizer and the model has none; name another "
            "model's with --tokenizer MODEL_OR_DIR, or give rows of input_ids"
        )
    if form.kind == "chat" and not tokenizer.chat_template:
        raise InputError(
            f"column {form.column!r} holds {form.title} and the model's tokenizer has no chat "
            "template: give one with --chat-template FILE_OR_TEXT, or a fine-tune's tokenizer with "
            "--tokenizer MODEL_OR_DIR"
        )


def numbered_rows(
    rows: Iterable[Any], form: RowFormat, part: tuple[int, int], left_out: LeftOut
) -> Iterator[tuple[int, Any]]:
    """Yield the hash and the content of every row of this part that has any."""
    for row in rows:
        try:
            content = form.read(row)
        except Unusable as reason:
            left_out[str(reason)] += 1
            continue
        number = row_hash(content)
        if number % part[1] == part[0]:
            yield number, content


def tokenised_rows(
    rows: Iterator[tuple[int, Any]],
    tokenizer: PreTrainedTokenizerBase,
    form: RowFormat,
    left_out: LeftOut,
    wanted: int,
) -> Iterator[Numbered]:
    """Yield the hash and the token ids of every row; texts get special tokens, chats their own.

    A row is tokenised as far as it may hold ``wanted`` tokens: a book in one line takes no more
    time and memory than what is used of it.

    Raises:
        InputError: the chat template refuses every row.
    """
    longest = max(_LEAST, wanted * _CHARACTERS)
    refusal: str | None = None
    rendered_any = False
    while batch := list(islice(rows, _ROWS_AT_ONCE)):
        if form.kind == "text":
            texts = [text[:longest] for _, text in batch]
            ids: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
            numbers = [number for number, _ in batch]
        else:
            numbers, texts = [], []
            for number, chat in batch:
                try:
                    text = render(tokenizer, chat)
                except ValueError as error:
                    refusal = refusal or str(error)
                    left_out["refused by the chat template"] += 1
                    continue
                texts.append(text[:longest])
                numbers.append(number)
            rendered_any = rendered_any or bool(texts)
            ids = tokenise_rendered(tokenizer, texts) if texts else []
        yield from zip(numbers, ids, strict=True)
    if refusal and not rendered_any:
        raise InputError(f"column {form.column!r}: the chat template refuses every row: {refusal}")


def short_rows(rows: Iterator[Numbered], longest: int, left_out: LeftOut) -> Iterator[Numbered]:
    """Yield the rows of at most ``longest`` tokens."""
    for number, ids in rows:
        if len(ids) > longest:
            left_out[f"longer than {longest} tokens"] += 1
        else:
            yield number, ids
