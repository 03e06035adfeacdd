"""How far a step went and in which direction, read tensor by tensor from the three models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_arm.streaming.plan.document import STEP_DTYPE

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


@dataclass(frozen=True)
class Move:
    """A whole step: norms over all weights, and angles over the matrices that moved."""

    update_norm: float
    task_norm: float
    """How far the checkpoint was."""
    rotation_degrees: dict[str, float] | None
    """Mean and largest angle; None where nothing moved."""


def measure_move(document: Mapping[str, Any], merged: str, options: MergeOptions) -> Move:
    """Compare ``merged`` with the models of the step ``document``.

    Tensors are found as mergekit finds them, under aliases and tied names too. Left out are
    those that not all models have in one shape (as where the tokenizer was changed).
    Holds one tensor of each model and a small float64 working copy.
    """
    LoaderCache().setup(options)
    configuration = MergeConfiguration.model_validate(dict(document))
    current, checkpoints = configuration.base_model, [m.model for m in configuration.models]
    architecture = get_architecture_info(configuration, options)
    after = configuration.base_model.model_validate(merged)
    weights = architecture.all_weights(after.config(trust_remote_code=options.trust_remote_code))
    moves: list[TensorMove] = []
    for weight in weights:
        tensors = [
            LoadTensor(
                model=model,
                tensor=weight.name,
                dtype=STEP_DTYPE,
                optional=True,
                aliases=weight.aliases,
                tied_names=weight.tied_names,
            ).execute()
            for model in (after, current, *checkpoints)
        ]
        if any(tensor is None for tensor in tensors):
            continue
        if len({tensor.shape for tensor in tensors}) == 1:
            goal = tensors[2] if len(tensors) == 3 else torch.stack(tensors[2:]).mean(dim=0)
            moves.append(compare(tensors[0], tensors[1], goal))
    angles = [move.angle for move in moves if move.matrix and move.angle is not None]
    return Move(
        math.hypot(*(move.update for move in moves)),
        math.hypot(*(move.task for move in moves)),
        {"mean": sum(angles) / len(angles), "max": max(angles)} if angles else None,
    )


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
