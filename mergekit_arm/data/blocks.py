"""Calibration data: rows of a data set → blocks of token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_arm.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_TOKEN_COLUMN, _CHAT_COLUMN, _TEXT_COLUMN = "input_ids", "messages", "text"
_ROWS_AT_ONCE = 64

MODEL_INPUTS = (
    "pixel_values",
    "pixel_values_videos",
    "image_grid_thw",
    "video_grid_thw",
    "image_sizes",
    "aspect_ratios",
    "token_type_ids",
    "mm_token_type_ids",
    "input_features",
    "attention_mask",
    "decoder_input_ids",
)
"""Columns that, beside ``input_ids``, are passed to the model as its processor made them."""


@dataclass(frozen=True)
class Corpus:
    """Token blocks ready for the forward loop."""

    blocks: list[Tensor]
    """int64, one dimension each; all of one length unless rows held token ids."""
    column: str
    split: str | None
    requested: int
    """Blocks asked for; fewer came out where the data set is small."""
    template_hash: str | None
    ready_ids: bool
    rows: Tensor
    """A 64-bit hash of every row that a block was cut from: (rows,) int64, rising, no two equal.

    Two measurements whose rows differ were made on disjoint data.
    """
    extras: list[dict[str, Tensor]] = field(default_factory=list)
    """What the model is given beside each block: images, audio. Empty where rows had none."""

    @property
    def tokens(self) -> int:
        return sum(len(block) for block in self.blocks)

    def content_hash(self) -> str:
        """Return a hash over every block's token ids, in order."""
        digest = hashlib.sha256()
        for block in self.blocks:
            digest.update(len(block).to_bytes(8, "little"))
            digest.update(block.numpy().tobytes())
        for extra in self.extras:
            for name, value in sorted(extra.items()):
                digest.update(f"{name} {list(value.shape)} ".encode())
                digest.update(value.numpy().tobytes())
        return digest.hexdigest()

    def extra(self, block: int) -> dict[str, Tensor]:
        """Return what the model is given beside ``block``."""
        return self.extras[block] if self.extras else {}

    @property
    def lengths(self) -> list[int]:
        """Tokens of every block."""
        return [len(block) for block in self.blocks]

    def stack(self, first: int, count: int) -> Tensor:
        """Return ``count`` blocks of one length as (sequences, length); nothing is padded."""
        return torch.stack(self.blocks[first : first + count])


def build_corpus(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    split: str | None,
    column: str | None,
    samples: int,
    sequence_length: int,
    seed: int,
    part: tuple[int, int] = (0, 1),
) -> Corpus:
    """Shuffle ``rows`` by ``seed`` and cut up to ``samples`` blocks from them.

    Texts and chats are tokenised, concatenated and cut every ``sequence_length`` tokens, as
    the AIM authors do; the last, shorter piece is dropped. Rows of ``input_ids`` are used as
    they are. Holds the token ids only.

    Of ``part`` (i, n) only rows whose content belongs to the i-th of n parts are used (i from
    0): equal rows fall into one part, so that parts share nothing.

    Raises:
        InputError: no usable column, no tokenizer or chat template where one is needed, or
            not one whole block.
    """
    column = _choose_column(rows, column)
    rows = rows.shuffle(seed=seed)
    sample = rows[0][column] if len(rows) else None
    while isinstance(sample, list) and sample and isinstance(sample[0], list):
        sample = sample[0]  # a processor returns a batch of one
    if isinstance(sample, list) and sample and isinstance(sample[0], int):
        return _ready_corpus(rows, column, split, samples, part)

    if tokenizer is None:
        raise InputError(
            f"column {column!r} needs a tokenizer and the model has none; "
            "give rows of input_ids instead"
        )
    chat = not isinstance(sample, str)
    stream: list[int] = []
    starts: list[tuple[int, int]] = []
    """Hash of every row, and where it begins in the stream."""
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        texts = [
            (_hash(text), text)
            for text in map(partial(_clean, chat=chat), rows[start : start + _ROWS_AT_ONCE][column])
            if text
        ]
        texts = [(number, text) for number, text in texts if number % part[1] == part[0]]
        tokenised = _tokenise([text for _, text in texts], tokenizer, chat=chat, column=column)
        for (number, _), ids in zip(texts, tokenised, strict=True):
            starts.append((number, len(stream)))
            stream.extend(ids)
        if len(stream) >= samples * sequence_length:
            break
    count = min(samples, len(stream) // sequence_length)
    if count == 0:
        raise InputError(
            f"the data has {len(stream)} tokens, less than one block of {sequence_length}: "
            "give more data or a smaller --sequence-length"
        )
    cut = torch.tensor(stream[: count * sequence_length], dtype=torch.int64)
    template = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest() if chat else None
    return Corpus(
        list(cut.view(count, sequence_length)),
        column,
        split,
        samples,
        template,
        ready_ids=False,
        rows=_row_tensor(number for number, start in starts if start < len(cut)),
    )


def _ready_corpus(
    rows: Dataset, column: str, split: str | None, requested: int, part: tuple[int, int]
) -> Corpus:
    """Use rows of token ids, and what stands beside them, as they are."""
    beside = [name for name in MODEL_INPUTS if name in rows.column_names and name != column]
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    hashes: list[int] = []
    for row in rows.select_columns([column, *beside]):
        if len(found) == requested:
            break
        ids = torch.tensor(row[column] or [], dtype=torch.int64).flatten()
        number = _hash([row[name] for name in (column, *beside)])
        if len(ids) and number % part[1] == part[0]:
            extra = {name: torch.tensor(row[name]) for name in beside if row[name] is not None}
            found.append((ids, extra))
            hashes.append(number)
    if not found:
        raise InputError(f"column {column!r} holds no token ids: nothing to measure")
    # Equal lengths side by side make full batches; sums do not mind the order.
    found.sort(key=lambda pair: len(pair[0]))
    extras = [extra for _, extra in found] if any(extra for _, extra in found) else []
    blocks = [ids for ids, _ in found]
    return Corpus(
        blocks,
        column,
        split,
        requested,
        None,
        ready_ids=True,
        rows=_row_tensor(hashes),
        extras=extras,
    )


def _hash(row: Any) -> int:
    """Return a hash of a row's content: 63 bits, the same on every machine."""
    content = json.dumps(row, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 1


def _row_tensor(hashes: Iterable[int]) -> Tensor:
    return torch.tensor(sorted(set(hashes)), dtype=torch.int64)


def _clean(row: Any, *, chat: bool) -> Any:
    """Return a row's text without blanks around it, or its chat; None or empty for none."""
    if chat:
        return row
    return row.strip() if isinstance(row, str) else None


def _choose_column(rows: Dataset, column: str | None) -> str:
    names: list[str] = list(rows.column_names)
    if column is not None:
        if column not in names:
            raise InputError(
                f"--text-column {column}: the data has {', '.join(names)}"
                f"{did_you_mean(column, names)}"
            )
        return column
    for known in (_TOKEN_COLUMN, _CHAT_COLUMN, _TEXT_COLUMN):
        if known in names:
            return known
    strings = [name for name in names if getattr(rows.features[name], "dtype", None) == "string"]
    if len(strings) == 1:
        return strings[0]
    raise InputError(f"which column holds the text? choose with --text-column: {', '.join(names)}")


def _tokenise(
    rows: list[Any], tokenizer: PreTrainedTokenizerBase, *, chat: bool, column: str
) -> list[list[int]]:
    if not rows:
        return []
    if not chat:
        found: list[list[int]] = tokenizer(rows, verbose=False)["input_ids"]
        return found
    if not tokenizer.chat_template:
        raise InputError(
            f"column {column!r} holds chats and the model's tokenizer has no chat template; "
            "give rows of text instead"
        )
    try:
        rendered = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
    except Exception as error:  # a template is a program of its own and may raise anything
        raise InputError(f"column {column!r}: the chat template refuses a row: {error}") from error
    # The template has written its own special tokens.
    chats: list[list[int]] = tokenizer(rendered, add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return chats
