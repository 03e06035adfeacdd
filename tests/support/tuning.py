"""What the tests of searches share: a family of tiny models, and commands with a known optimum."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support.models import perturbed, tiny_llama
from tests.support.streams import write_tokens

DISTANCE = """
import sys
import numpy
from safetensors.numpy import load_file
model, goal = (load_file(f"{folder}/model.safetensors") for folder in sys.argv[1:])
print(sum(float(((model[n].astype(float) - goal[n]) ** 2).sum()) for n in sorted(goal)))
"""
"""The squared distance between two models: a quadratic of every weight of a linear merge."""


def write_family(folder: Path) -> None:
    """Save ``base``, ``a``, ``b``, and three files of tokens: ``one``, ``two`` and ``test``."""
    base = tiny_llama(0)
    base.save_pretrained(folder / "base")
    perturbed(base, 1, 0.05).save_pretrained(folder / "a")
    perturbed(base, 2, 0.05).save_pretrained(folder / "b")
    for seed, name in enumerate(("one", "two", "test")):
        write_tokens(folder / f"{name}.jsonl", seed + 20)


def write_goal(folder: Path, **weights: float) -> Path:
    """Save the model that these weights give, written without mergekit."""
    base = load_file(folder / "base" / "model.safetensors")
    found = {name: tensor.double() for name, tensor in base.items()}
    for model, weight in weights.items():
        other = load_file(folder / model / "model.safetensors")
        for name in found:
            found[name] = found[name] + weight * (other[name].double() - base[name].double())
    model = tiny_llama(0)
    model.load_state_dict({name: tensor.float() for name, tensor in found.items()}, strict=False)
    model.save_pretrained(folder / "goal")
    return folder / "goal"


def distance_set(folder: Path, goal: Path) -> dict[str, Any]:
    """Return an evaluation set: the distance to a goal, which is to be small."""
    script = folder / "distance.py"
    script.write_text(DISTANCE)
    return {"metric_command": f"{sys.executable} {script} {{model}} {goal}", "goal": "minimize"}


def config(folder: Path, tuning: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a search over the weight of ``a``; None removes a key."""
    document: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / "a"), "parameters": {"weight": {"tune": [0.0, 1.0]}}},
            {"model": str(folder / "b"), "parameters": {"weight": 0.0}},
        ],
        "dtype": "float32",
        "tuning": {
            "evaluation": {"one": {"dataset": str(folder / "one.jsonl")}},
            "trials": 4,
            "dtype": "float32",
            **tuning,
        },
    }
    document.update(changes)
    return {key: value for key, value in document.items() if value is not None}


def lines(out: Path) -> list[dict[str, Any]]:
    """Read ``trials.jsonl``."""
    return [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read a model."""
    return load_file(folder / "model.safetensors")
