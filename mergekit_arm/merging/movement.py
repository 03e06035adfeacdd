"""How far a merge moved a weight, and in which direction, beside the way to the other model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class TensorMove:
    """One tensor's part in a step. Norms are Frobenius norms."""

    update: float
    """‖W' − W‖, W' the merged and W the current weight."""
    task: float
    """‖W_c − W‖, W_c the checkpoint's weight, or the mean of several."""
    angle: float | None
    """Degrees between W' − W and W_c − W; None where one of them is zero."""
    matrix: bool


def compare(after: Tensor, before: Tensor, checkpoint: Tensor) -> TensorMove:
    """Return the move of one weight, all three of one shape; sums in float64.

    The angle is atan2(√(‖u‖²‖t‖² − ⟨u,t⟩²), ⟨u,t⟩) of update u and task vector t, good to about
    1e-6 degrees; that of u itself, a difference of float32 numbers, is seldom better.
    """
    squares = torch.zeros(3, dtype=torch.float64)
    flat = [tensor.reshape(-1) for tensor in (after, before, checkpoint)]
    for new, old, goal in zip(*(torch.split(t, _CHUNK_ELEMENTS) for t in flat), strict=True):
        start = old.double()
        u, t = new.double() - start, goal.double() - start
        squares += torch.stack([u @ u, t @ t, u @ t])
    update, task, product = squares.tolist()
    angle = None
    if update > 0 and task > 0:
        across = math.sqrt(max(update * task - product**2, 0.0))
        angle = math.degrees(math.atan2(across, product))
    return TensorMove(math.sqrt(update), math.sqrt(task), angle, after.ndim >= 2)
