"""What is accumulated at a site, and how it adds up.

An observer holds sums only, so that batches, ranks, files and resumed runs combine by
addition. A new observer is one more file like this one and one line in ``OBSERVERS`` of
``calibration/collect.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Observer(Protocol):
    """Accumulates one statistic of one site's input."""

    def update(self, x: Tensor) -> None:
        """Add the rows of ``x``: (tokens, in), floating point, on the observer's device."""

    def state(self) -> dict[str, Tensor]:
        """Return what has accumulated; every entry adds up over batches, ranks and files."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from an earlier ``state()``."""

    def finish(self) -> dict[str, Tensor]:
        """Return what a published directory stores for the site."""

    def result_bytes(self) -> int:
        """Return how much ``finish`` will store at most; known before anything is seen."""

    def checksum(self) -> Tensor:
        """Return a scalar that is finite exactly when every input so far was finite."""
