"""The same search as a study's grid, by the package's own ``tune``: as many trials, from files."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

import mergekit_arm as ma
from tests.evidence.merging import State
from tests.evidence.runs import Run, states
from tests.support.paths import ROOT

METHODS = ("task_arithmetic", "aim_task_arithmetic")


def searched(method: str, runs: Mapping[str, Run], seed: int) -> tuple[State, dict[str, Any]]:
    """Return the best merge's weights, and its parameters as ``tune`` wrote them."""
    base = next(iter(runs.values())).base
    score = [
        "env",
        f"PYTHONPATH={ROOT}",
        sys.executable,
        "-m",
        "tests.evidence.score",
        "--size",
        base.size.name,
    ]
    score += ["--work", str(base.work.parent), "--seed", str(seed)]
    score += [part for task in runs for part in ("--task", task)]
    weight = {"tune": [min(base.size.weights), max(base.size.weights)], "name": "weight"}
    config: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(base.folder),
        "models": [
            {"model": str(run.checkpoint(1.0)), "parameters": {"weight": weight}}
            for run in runs.values()
        ],
        "dtype": "float32",
        "tuning": {
            "evaluation": {
                "tasks": {
                    "metric_command": f"{shlex.join(score)} {{model}}",
                    "goal": "minimize",
                }
            },
            "trials": len(base.size.weights),
            "baseline": False,
            "seed": seed,
        },
    }
    if method.startswith("aim_"):
        stats = str(base.statistics("general"))
        config["parameters"] = {"activation_stats": stats, "omega": {"tune": [0.0, 0.8]}}
    with TemporaryDirectory(dir=base.work) as folder:
        out = Path(folder) / "tuned"
        ma.tune(config, out)
        found = yaml.safe_load((out / "best.yml").read_text(encoding="utf-8"))
        best = {"weight": found["models"][0]["parameters"]["weight"], **found.get("parameters", {})}
        best.pop("activation_stats", None)
        merged = states(out / "model")
        shutil.rmtree(out)
    return merged, best
