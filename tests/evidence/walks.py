"""Streams: early checkpoints merged one after another, each step at the best of several rates.

A rate of 0 is always among them, so that no step makes the model worse on the validation split.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from safetensors.torch import save_file

from tests.evidence.averages import AVERAGES
from tests.evidence.merging import State, merge
from tests.evidence.recipes import Statistics
from tests.evidence.runs import Run, states


@dataclass(frozen=True)
class Walk:
    """One stream: linear steps without statistics, ARM's with."""

    label: str
    measured: Literal["never", "on the base", "at every step"]
    """When statistics were measured."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Of a step, but for its rate and statistics."""

    @property
    def retaining(self) -> bool:
        """Whether steps turn by the task's text too, with ``task_stats``."""
        return "retain" in self.parameters

    @property
    def method(self) -> str:
        """mergekit's name of a step's method."""
        return "task_arithmetic" if self.measured == "never" else "arm"

    def settings(self, rate: float) -> dict[str, Any]:
        """Return the parameters of a step, but for statistics."""
        return {"weight" if self.measured == "never" else "learning_rate": rate, **self.parameters}


TURNS: dict[str, dict[str, float]] = {
    "arm ρ = -0.4": {"rotation": -0.4, "energy": 0.9},
    "task_stats, κ = 0.3": {"retain": 0.3},
    "arm, leading direction alone, ρ = -1.0": {"rotation": -1.0, "energy": 0.01},
}
WALKS = (
    Walk("stream, linear, η searched", "never"),
    *(
        walk
        for name, parameters in TURNS.items()
        for walk in (
            Walk(f"stream, {name}, η searched, base's statistics", "on the base", parameters),
            Walk(f"stream, {name}, η searched, fresh statistics", "at every step", parameters),
        )
    ),
)


def follow(
    walk: Walk, run: Run, base: State, rates: Sequence[float], loss: Callable[[State], float]
) -> tuple[State, list[float]]:
    """Return the weights after the last step, and the rate of each."""
    current, least, chosen = base, loss(base), []
    for fraction in AVERAGES["early"]:
        checkpoint = states(run.checkpoint(fraction))
        with TemporaryDirectory(dir=run.folder) as folder:
            stats = _statistics(walk, run, current, Path(folder))
            best, taken = current, 0.0
            for rate in rates:
                step = {**walk.settings(rate), **stats}
                merged = merge(
                    walk.method, current, {"run": checkpoint}, step, lambda of, _: Path(of)
                )
                if (found := loss(merged)) < least:
                    best, taken, least = merged, rate, found
        current = best
        chosen.append(taken)
    return current, chosen


def _statistics(walk: Walk, run: Run, current: State, folder: Path) -> dict[str, Any]:
    """Return the parameters that name the statistics; fresh ones are measured into ``folder``."""
    if walk.measured == "never":
        return {}
    if walk.measured == "on the base":
        stats = run.statistics("general")
        metadata = json.loads((stats / "activation_stats.json").read_text(encoding="utf-8"))
        found = {"activation_stats": stats}
        if walk.retaining:
            found["task_stats"] = run.statistics("task")
        known = {"measured_on": metadata["model"]["content_hash"]}
        return {**{name: Statistics(str(path)) for name, path in found.items()}, **known}
    model = folder / "model"
    kept = shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(run.base.folder, model, ignore=kept)
    save_file(current, model / "model.safetensors", metadata={"format": "pt"})
    found = {"activation_stats": folder / "statistics"}
    run.base.measure_text("general", model, found["activation_stats"])
    if walk.retaining:
        found["task_stats"] = folder / "task"
        run.base.measure(run.texts(), model, found["task_stats"])
    return {name: Statistics(str(path)) for name, path in found.items()}
