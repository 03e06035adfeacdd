"""A uniform sample of the calibration tokens, for statistics that need only some thousands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_STRIDE = 1_000_003  # a prime, so that neighbouring blocks' seeds are unrelated


class TokenSample:
    """At most ``tokens`` positions, spread evenly over all blocks.

    Which positions depends on the seed and the block's number only: not on the batch size, nor
    on how blocks are divided among processes.
    """

    def __init__(
        self, lengths: Sequence[int], tokens: int, *, seed: int, skip_first: int = 0
    ) -> None:
        """Plan the sample.

        Args:
            lengths: tokens of every block, in order.
            tokens: at most this many positions in all; fewer where the data has fewer.
            seed: decides the positions.
            skip_first: leave the first so many positions of every block out.
        """
        self._eligible = [max(0, length - skip_first) for length in lengths]
        self.lengths = list(lengths)
        self._skip = skip_first
        self._seed = seed
        total = sum(self._eligible)
        wanted = min(tokens, total)
        # Block i gets the difference of two roundings, so that the shares add up exactly.
        seen, self._quota = 0, []
        for eligible in self._eligible:
            before = seen * wanted // max(total, 1)
            seen += eligible
            self._quota.append(seen * wanted // max(total, 1) - before)

    def rows(self, first: int, count: int) -> Tensor | None:
        """Return the sampled rows of blocks ``first … first + count``, flattened as one batch.

        All blocks of a batch have one length. None means every row, so that nothing is copied
        where the sample is the whole.
        """
        numbers = range(first, first + count)
        if all(self._quota[i] == self.lengths[i] for i in numbers):
            return None
        length = self.lengths[first]
        return torch.cat([self._positions(i) + (i - first) * length for i in numbers])

    def _positions(self, block: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed * _STRIDE + block)
        order = torch.randperm(self._eligible[block], generator=generator)
        return order[: self._quota[block]].sort().values + self._skip
