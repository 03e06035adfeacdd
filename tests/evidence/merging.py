"""Merging in memory, by mergekit's own functions and the methods of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods import PerGroupValues, merge_state_dicts
from torch import Tensor
from transformers import PreTrainedModel

from tests.evidence.recipes import ByDepth, ByName, Settings, Statistics

State = dict[str, Tensor]
BASE = "base"

Locate = Callable[[str, str], Path]
"""``locate(of, model)``: the directory of the statistics of this name, for this model."""


@torch.no_grad()
def merge(
    method: str, base: State, models: Mapping[str, State], settings: Settings, locate: Locate
) -> State:
    """Return the merged weights, in float32."""

    def resolved(value: Any) -> Any:
        if isinstance(value, ByName | ByDepth):
            return PerGroupValues(value(list(base)))
        if not isinstance(value, Statistics):
            return value
        if not value.each:
            return str(locate(value.of, BASE))
        # The base is asked for one too, and its general text is what it would keep to.
        own = {name: str(locate(value.of, name)) for name in models}
        return {BASE: str(locate("general", BASE)), **own}

    return merge_state_dicts(
        {BASE: base, **models},
        method,
        base=BASE,
        parameters={name: resolved(value) for name, value in settings.items()},
    )


def put(model: PreTrainedModel, state: State) -> PreTrainedModel:
    """Load weights into ``model``; tied ones may be there once."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or model._tied_weights_keys or ())
    if unexpected or set(missing) - tied:
        raise ValueError(f"unexpected {unexpected}, missing {sorted(set(missing) - tied)}")
    model.tie_weights()
    return model
