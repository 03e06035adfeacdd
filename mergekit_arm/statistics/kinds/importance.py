"""Importance: how strongly each input channel is excited, for AIM."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Importance:
    """Σ|x| and Σx² of every input channel (AIM, arXiv 2502.02421, section 3).

    Rows of one batch are summed in float32 and batches in float64: at 10⁷ tokens a float32
    running sum has lost digits (``tests/statistics/kinds/test_importance.py`` shows how many).
    Holds 2 × in float64 values and a scratch copy of the largest batch.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        # Apple's GPUs have no float64.
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.abs_sum = torch.zeros(width, dtype=wide, device=device)
        self.square_sum = torch.zeros(width, dtype=wide, device=device)

    def update(self, x: Tensor) -> None:
        magnitude = x.abs() if x.dtype == torch.float32 else x.float().abs_()
        self.abs_sum += magnitude.sum(0)
        self.square_sum += magnitude.square_().sum(0)

    def state(self) -> dict[str, Tensor]:
        return {"abs_sum": self.abs_sum, "square_sum": self.square_sum}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.abs_sum.copy_(state["abs_sum"])
        self.square_sum.copy_(state["square_sum"])

    def finish(self) -> dict[str, Tensor]:
        return self.state()

    def result_bytes(self) -> int:
        return self.abs_sum.nbytes + self.square_sum.nbytes

    def checksum(self) -> Tensor:
        # Squares overflow before magnitudes do; an overflow is as useless as a NaN.
        return self.square_sum.sum()
