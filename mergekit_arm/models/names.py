"""Which parameter of the loaded model each tensor of the checkpoint went into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor of the checkpoint, of any dtype, and where transformers puts it."""

    name: str
    parameter: str | None
    """Name in the loaded model; None where transformers does not load it."""
    converter: WeightConverter | None = None
    """What made it a part of ``parameter`` (fused experts, …), where it was not only renamed."""
    pattern: str = ""
    """Which of the converter's sources it is."""


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
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    prefix = model.base_model_prefix
    found = []
    # In the order in which transformers loads them: some renamings depend on it.
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in parameters and name in parameters:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in parameters:
            found.append(CheckpointTensor(name, None))
        elif pattern is None:
            found.append(CheckpointTensor(name, target))
        else:
            found.append(CheckpointTensor(name, target, by_pattern[pattern], pattern))
    return found
