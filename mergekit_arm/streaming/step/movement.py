"""How far a step went and in which direction, read tensor by tensor from the three models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions

from mergekit_arm.merging.movement import TensorMove, compare
from mergekit_arm.streaming.plan.document import STEP_DTYPE
from mergekit_arm.streaming.state import Move


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
    turned = {"mean": sum(angles) / len(angles), "max": max(angles)} if angles else None
    return Move(
        update_norm=math.hypot(*(move.update for move in moves)),
        task_norm=math.hypot(*(move.task for move in moves)),
        rotation_degrees=turned,
    )
