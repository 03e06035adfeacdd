"""Which parameter of the loaded model each tensor of the checkpoint went into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


@dataclass(frozen=True)
class CheckpointTensor:
    """A floating-point tensor of the checkpoint and where transformers put it."""

    name: str
    parameter: str | None
    """Name in the loaded model; None where transformers does not load it."""
    converted: bool
    """True where it became a part of ``parameter`` (fused experts, …)."""


def map_checkpoint(model: PreTrainedModel, names: list[str]) -> list[CheckpointTensor]:
    """Map checkpoint tensor ``names`` to parameters by transformers' own loading rules.

    Follows its renamings, its conversions and the base model's prefix, so that statistics
    can be stored under the names that mergekit will ask for.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state: dict[str, torch.Tensor] = model.state_dict()
    parameters = set(state) | {n for n, _ in model.named_parameters(remove_duplicate=False)}
    found = []
    for name in names:
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if target not in parameters and name in parameters:
            target, pattern = name, None
        known = target in parameters
        found.append(CheckpointTensor(name, target if known else None, pattern is not None))
    return found
