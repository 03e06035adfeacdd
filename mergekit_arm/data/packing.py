"""Rows of token ids, one after the other → one stream of tokens. Knows no files and no text."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Numbered = tuple[int, Sequence[int]]
"""A row's hash and its token ids."""


@dataclass
class Packed:
    """Rows end to end."""

    stream: array[int]
    starts: list[tuple[int, int]]
    """Hash of every row, and where it begins in the stream; rising."""
    cut: int
    """Rows that are not in the stream to their end."""

    def blocks(self, count: int, length: int) -> list[Tensor]:
        """Return the stream's first ``count`` pieces of ``length`` tokens; what remains is lost."""
        whole = min(count, len(self.stream) // length)
        if whole == 0:
            return []
        ids = torch.tensor(self.stream[: whole * length], dtype=torch.int64)
        return list(ids.view(whole, length))

    def rows(self, tokens: int) -> list[int]:
        """Return the hash of each row that begins in the stream's first ``tokens``."""
        return [number for number, start in self.starts if start < tokens]


def pack(rows: Iterable[Numbered], tokens: int, longest: int) -> Packed:
    """Put rows end to end until there are ``tokens`` of them, each row's first ``longest`` only.

    Should the rows end before, the long ones give their next ``longest`` tokens each, in the same
    order, and so on: then no row fills more than its share as long as others have something left.
    Takes no more rows than it needs; holds, of long rows, up to ``tokens`` each.
    """
    packed = Packed(array("q"), [], 0)
    rest: list[Sequence[int]] = []
    for number, ids in rows:
        packed.starts.append((number, len(packed.stream)))
        packed.stream.extend(ids[:longest])
        if len(ids) > longest:
            rest.append(array("q", ids[longest : longest + tokens]))
        if len(packed.stream) >= tokens:
            break
    while rest and len(packed.stream) < tokens:
        turn, rest = rest, []
        for ids in turn:
            if len(packed.stream) < tokens:
                packed.stream.extend(ids[:longest])
                ids = ids[longest:]
            if len(ids):
                rest.append(ids)
    packed.cut = len(rest)
    return packed
