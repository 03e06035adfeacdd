"""A step as an ordinary mergekit configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from mergekit_arm.methods.base import STATS
from mergekit_arm.streaming.config import StreamConfig
from mergekit_arm.streaming.plan.method import StepMethod
from mergekit_arm.streaming.rates import Rate

TOKENS = ("tokenizer_source", "tokenizer", "chat_template")
"""mergekit's own keys that are handed on to every step."""

STEP_DTYPE = "float32"
"""Of the running model: rounding it at every step would add up."""
STEP_BYTES = 4
"""Of one of its elements."""


def step_document(
    config: StreamConfig,
    method: StepMethod,
    *,
    current: str,
    checkpoints: Sequence[str],
    rates: Sequence[Rate] | None,
    statistics: Mapping[str, str] = MappingProxyType({}),
    own_statistics: Sequence[str] = (),
    chat_template: str | None = None,
) -> dict[str, Any]:
    """Return the mergekit configuration of one step: ``checkpoints`` merged into ``current``.

    ``statistics``: parameters of the merge that say where these are; ``own_statistics``: where
    those of each checkpoint are. ``chat_template``: a checkpoint's, where neither the base nor
    the configuration has one.
    """
    shared = {**config.parameters, **method.fixed, **statistics}
    models: list[dict[str, Any]] = []
    for index, checkpoint in enumerate(checkpoints):
        incoming: dict[str, Any] = {}
        if method.rate_parameter and rates is not None:
            (shared if method.rate_is_shared else incoming)[method.rate_parameter] = rates[index]
        if own_statistics:
            incoming[STATS] = own_statistics[index]
        models.append({"model": checkpoint, **({"parameters": incoming} if incoming else {})})
    kept = {key: getattr(config, key) for key in TOKENS}
    kept["chat_template"] = chat_template or config.chat_template
    return {
        "merge_method": method.name,
        "base_model": current,
        "models": models,
        "dtype": STEP_DTYPE,
        **({"parameters": shared} if shared else {}),
        **{key: value for key, value in kept.items() if value is not None},
    }


def average_document(models: Sequence[str]) -> dict[str, Any]:
    """Return the mergekit configuration of the uniform average of ``models``."""
    weighted = [{"model": one, "parameters": {"weight": 1.0}} for one in models]
    return {"merge_method": "linear", "models": weighted, "dtype": STEP_DTYPE}


def cast_document(model: str, dtype: str) -> dict[str, Any]:
    """Return the mergekit configuration that copies ``model`` in another dtype."""
    return {"merge_method": "passthrough", "models": [{"model": model}], "out_dtype": dtype}
