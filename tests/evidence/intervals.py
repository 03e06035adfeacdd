"""How sure a difference is: a paired bootstrap over examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
SEED = 11


@dataclass(frozen=True)
class Difference:
    """A mean of differences, and the middle 95 % of its bootstrap distribution."""

    mean: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        mark = "" if self.sure else " ·"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]{mark}"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Return the mean of ``ours − theirs`` over the same examples, with its interval."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} and {len(theirs)} examples cannot be paired")
    apart = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    drawn = np.random.default_rng(SEED).integers(len(apart), size=(DRAWS, len(apart)))
    low, high = np.quantile(apart[drawn].mean(axis=1), (0.025, 0.975))
    return Difference(float(apart.mean()), float(low), float(high))
