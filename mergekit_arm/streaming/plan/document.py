"""A step as an ordinary mergekit configuration, and the command that repeats it by hand."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from mergekit.config import ConfigYamlDumper, MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_arm.methods.arm import TASK
from mergekit_arm.streaming.config import StreamConfig
from mergekit_arm.streaming.plan.method import StepMethod

STEP_DTYPE = "float32"
"""Of the running model: rounding it at every step would add up."""
STEP_BYTES = 4
"""Of one of its elements."""


def step_document(
    config: StreamConfig,
    method: StepMethod,
    *,
    current: str,
    checkpoint: str,
    learning_rate: float | None,
    statistics: Path | None,
    task_statistics: Path | None,
    checkpoint_statistics: Path | None,
) -> dict[str, Any]:
    """Return the mergekit configuration of one step: ``current`` merged with ``checkpoint``."""
    shared = {**config.parameters, **method.fixed}
    incoming: dict[str, Any] = {}
    if method.rate_parameter and learning_rate is not None:
        (shared if method.rate_is_shared else incoming)[method.rate_parameter] = learning_rate
    if statistics is not None:
        shared["activation_stats"] = str(statistics)
    if task_statistics is not None:
        shared[TASK] = str(task_statistics)
    if checkpoint_statistics is not None:
        incoming["activation_stats"] = str(checkpoint_statistics)
    model: dict[str, Any] = {"model": checkpoint}
    if incoming:
        model["parameters"] = incoming
    document: dict[str, Any] = {
        "merge_method": method.name,
        "base_model": current,
        "models": [model],
        "dtype": STEP_DTYPE,
    }
    if shared:
        document["parameters"] = shared
    for key in ("tokenizer_source", "tokenizer", "chat_template"):
        value = getattr(config, key)
        if value is not None:
            document[key] = value
    return document


def cast_document(model: str, dtype: str) -> dict[str, Any]:
    """Return the mergekit configuration that copies ``model`` in another dtype."""
    return {"merge_method": "passthrough", "models": [{"model": model}], "out_dtype": dtype}


def to_yaml(document: Mapping[str, Any], comment: Iterable[str] = ()) -> str:
    """Return the configuration's text, ``comment`` lines first."""
    lines = "".join(f"# {line}\n" for line in comment)
    return lines + str(yaml.dump(dict(document), Dumper=ConfigYamlDumper, sort_keys=False))


def check_document(document: Mapping[str, Any]) -> None:
    """Let mergekit parse a configuration.

    Raises:
        ValueError: it does not (pydantic's error among them).
    """
    MergeConfiguration.model_validate(dict(document))


def by_hand(config_file: Path, options: MergeOptions, document: Mapping[str, Any]) -> str:
    """Return the ``mergekit-yaml`` command that repeats a merge, with the flags that change it."""
    words = ["mergekit-yaml", str(config_file), "OUT"]
    if "+" in models_of(document):
        words += ["--lora-merge-cache", "CACHE"]
    for name in ("random_seed", "lora_merge_dtype"):
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    for name in ("allow_crimes", "unsafe_truncate_embeddings", "trust_remote_code"):
        if getattr(options, name):
            words.append(f"--{name.replace('_', '-')}")
    return shlex.join(words)


def models_of(document: Mapping[str, Any]) -> str:
    """Return the models of a configuration, for a message: ``a, b into base``."""
    models = [str(entry["model"]) for entry in document["models"]]
    base = document.get("base_model")
    return f"{', '.join(models)}{f' into {base}' if base else ''}"
