"""How many rows were used, and why others were not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RowCounts:
    """Rows of one data set, as far as it was read."""

    used: int
    """Rows that a block was cut from."""
    cut: int = 0
    """Of these, rows that were too long to be used to their end."""
    limit: int | None = None
    """The tokens above which a row is too long."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows that were not used, by the reason."""

    def __str__(self) -> str:
        parts = [f"{self.used:,} row{'s' * (self.used != 1)} used"]
        if self.cut:
            parts.append(f"{self.cut:,} of them cut at {self.limit:,} tokens")
        text = ", ".join(parts)
        if self.left_out:
            reasons = ", ".join(
                f"{count:,} {reason}" for reason, count in sorted(self.left_out.items())
            )
            text += f"; {sum(self.left_out.values()):,} left out: {reasons}"
        return text


LeftOut = Counter[str]
"""Rows left out so far, by the reason."""
