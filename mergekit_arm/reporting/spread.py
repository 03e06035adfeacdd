"""How values between 0 and 1 are distributed, counted while they stream by."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 1000


class Spread:
    """Counts values in bins of a thousandth; holds nothing else of them."""

    def __init__(self) -> None:
        """Start with none."""
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count ``values``, of any shape, in [0, 1]."""
        # A float32 such as 0.4 is a little less than what it stands for.
        found = (values.flatten().double() * BINS + 1e-3).long().clamp(0, BINS - 1)
        self.counts += torch.bincount(found, minlength=BINS)

    def merge(self, other: Spread) -> None:
        """Count what ``other`` has counted."""
        self.counts += other.counts

    @property
    def total(self) -> int:
        """How many values there were."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """Return the middle of the bin below which ``share`` of the values lie; to a thousandth."""
        reached = self.counts.cumsum(0) >= share * self.total
        return (int(reached.int().argmax()) + 0.5) / BINS

    @property
    def least(self) -> float:
        """Return where the lowest bin that holds a value begins; 0 where none does."""
        return int((self.counts > 0).int().argmax()) / BINS

    def shares(self, bins: int) -> list[float]:
        """Return the share of the values in each of ``bins`` equal bins, a divisor of 1000."""
        return (self.counts.reshape(bins, -1).sum(1).double() / max(self.total, 1)).tolist()
