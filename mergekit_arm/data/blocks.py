"""Calibration data: rows of a data set → blocks of token ids."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_arm.data.counts import LeftOut, RowCounts
from mergekit_arm.data.formats import USUAL_COLUMNS, RowFormat, Unusable, find_format
from mergekit_arm.data.masks import MASKS, MODEL_INPUTS, read_ids
from mergekit_arm.data.packing import pack
from mergekit_arm.data.rows import columns_of, first_rows, in_order
from mergekit_arm.data.tokens import (
    check_tokenizer,
    numbered_rows,
    row_hash,
    short_rows,
    tokenised_rows,
)
from mergekit_arm.errors import InputError
from mergekit_arm.statistics.format import MixtureRecord

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

_ROWS_LOOKED_AT = 256
"""Rows by which the format is recognised: the first of them may be empty."""


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
    mixture: tuple[MixtureRecord, ...] = ()
    """What each of several data sets gave; empty for one."""
    notes: tuple[str, ...] = ()
    """For people: how rows were read, how many were used, and why others were not."""
    noteworthy: bool = False
    """Whether rows were left out, token ids cut, or the format is not a usual one."""
    excerpt: str = ""
    """The beginning of the first block as text; empty without a tokenizer."""

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

    @cached_property  # asked for once for each batch
    def lengths(self) -> list[int]:
        """Tokens of every block."""
        return [len(block) for block in self.blocks]

    def stack(self, first: int, count: int) -> Tensor:
        """Return ``count`` blocks of one length as (sequences, length); nothing is padded."""
        return torch.stack(self.blocks[first : first + count])


def build_corpus(
    rows: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    split: str | None,
    column: str | None,
    samples: int,
    sequence_length: int,
    seed: int,
    part: tuple[int, int] = (0, 1),
    max_tokens_per_row: int | None = None,
    longest: int | None = None,
    recipe: str = "packed",
) -> Corpus:
    """Shuffle ``rows`` by ``seed`` and cut up to ``samples`` blocks from them.

    Texts and chats are tokenised, concatenated and cut every ``sequence_length`` tokens; the last,
    shorter piece is dropped. Of a longer row only the first ``max_tokens_per_row`` (one sequence)
    are used unless the others do not suffice. ``recipe`` "aim" is the AIM authors' own rule: texts
    longer than a sequence are left out, and ``samples`` texts are taken, whatever blocks they make.

    Rows of ``input_ids`` are used as they are, without padding; at most ``max_tokens_per_row`` of
    each, and ``longest``, which is what the model takes. Holds the token ids only.

    Of ``part`` (i, n) only rows whose content belongs to the i-th of n parts are used (i from
    0): equal rows fall into one part, so that parts share nothing.

    Raises:
        InputError: no usable column, no tokenizer or chat template where one is needed, a mask
            that does not fit its row, or not one whole block.
    """
    form = recognise(rows, column, seed)
    if form.kind == "ids":
        limit = min((n for n in (max_tokens_per_row, longest) if n), default=None)
        return _ready_corpus(rows, form, split, samples, seed, part, limit)
    check_tokenizer(form, tokenizer)
    assert tokenizer is not None
    left_out: LeftOut = Counter()
    texts = numbered_rows(in_order(rows, seed, list(form.columns)), form, part, left_out)
    wanted = samples * sequence_length
    tokenised = tokenised_rows(texts, tokenizer, form, left_out, wanted)
    if recipe == "aim":
        limit = sequence_length
        packed = pack(islice(short_rows(tokenised, limit, left_out), samples), wanted, limit)
        requested = min(samples, max(1, len(packed.stream) // sequence_length))
    else:
        limit = max_tokens_per_row or sequence_length
        packed = pack(tokenised, wanted, limit)
        requested = samples
    blocks = packed.blocks(samples, sequence_length)
    if not blocks:
        raise InputError(
            f"the data has {len(packed.stream)} tokens, less than one block of {sequence_length}: "
            f"give more data or a smaller --sequence-length{_reasons(left_out)}"
        )
    used = packed.rows(len(blocks) * sequence_length)
    counts = RowCounts(len(used), packed.cut, limit, left_out)
    template = str(tokenizer.chat_template).encode() if form.kind == "chat" else None
    return Corpus(
        blocks,
        form.column,
        split,
        requested,
        hashlib.sha256(template).hexdigest() if template is not None else None,
        ready_ids=False,
        rows=row_tensor(used),
        notes=(f"{counts} ({form})",),
        noteworthy=bool(left_out) or form.column not in USUAL_COLUMNS,
    )


def recognise(rows: Dataset | IterableDataset, column: str | None, seed: int) -> RowFormat:
    """Return what the rows are; see :func:`~mergekit_arm.data.formats.find_format`."""
    names = columns_of(rows)
    # Pixels and the like say nothing of the format, and take long to read.
    candidates = [name for name in names if name not in MODEL_INPUTS or name == column]
    first = first_rows(rows, seed, candidates, _ROWS_LOOKED_AT)
    if not first:
        raise InputError("the data set is empty: give another --dataset")
    return find_format(first, names, column)


def _ready_corpus(
    rows: Dataset | IterableDataset,
    form: RowFormat,
    split: str | None,
    requested: int,
    seed: int,
    part: tuple[int, int],
    limit: int | None,
) -> Corpus:
    """Use rows of token ids, and what stands beside them, as they are."""
    column = form.column
    names = columns_of(rows)
    columns = [column, *(name for name in MODEL_INPUTS if name in names and name != column)]
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    hashes: set[int] = set()
    left_out: LeftOut = Counter()
    cut = 0
    for row in in_order(rows, seed, columns):
        if len(found) == requested:
            break
        try:
            ids, extra = read_ids(row, column)
            number = _ready_hash(row, columns, ids)
            if number % part[1] != part[0]:
                continue
            if limit and len(ids) > limit:
                if extra:  # an image's tokens cannot be cut from the image
                    raise Unusable(f"longer than {limit} tokens")
                ids = ids[:limit]
                cut += 1
        except Unusable as reason:
            left_out[str(reason)] += 1
            continue
        found.append((ids, extra))
        hashes.add(number)
    if not found:
        raise InputError(
            f"column {column!r} holds no token ids: nothing to measure{_reasons(left_out)}"
        )
    # Equal lengths side by side make full batches; sums do not mind the order.
    found.sort(key=lambda pair: len(pair[0]))
    counts = RowCounts(len(found), cut, limit, left_out)
    return Corpus(
        [ids for ids, _ in found],
        column,
        split,
        requested,
        None,
        ready_ids=True,
        rows=row_tensor(hashes),
        extras=[extra for _, extra in found] if any(extra for _, extra in found) else [],
        notes=(f"{counts} ({form})",),
        noteworthy=bool(left_out or cut),
    )


def _ready_hash(row: Mapping[str, Any], columns: Sequence[str], ids: Tensor) -> int:
    """Return a hash of a row; how it was padded makes no difference."""
    if all(row.get(mask) is None for mask in MASKS):
        return row_hash([row[name] for name in columns])
    return row_hash([ids.tolist(), *(row[name] for name in columns[1:] if name not in MASKS)])


def row_tensor(hashes: Iterable[int]) -> Tensor:
    """Return hashes as a statistics directory stores them: (rows,) int64, rising."""
    return torch.tensor(sorted(set(hashes)), dtype=torch.int64)


def _reasons(left_out: LeftOut) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
    return f" (rows left out: {reasons})" if reasons else ""
