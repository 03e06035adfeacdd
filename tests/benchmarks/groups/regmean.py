"""A merge by RegMean, as a command, against mergekit's task arithmetic on the same inputs."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.harness import MEMORY, PROCESSOR, TIME, WALL, Measured, Row, Side, compare
from tests.benchmarks.inputs import REAL, Workshop


def merge_regmean(shop: Workshop) -> list[Row]:
    """Two models by ``regmean``; on the real SmolLM2, for its activations' directions."""
    shape = shop.shape(REAL)

    def merge(method: str, statistics: bool) -> Measured:
        models: list[dict[str, Any]] = []
        for tuned in (1, 2):
            parameters: dict[str, Any] = {"weight": 0.5}
            if statistics:
                parameters["activation_stats"] = str(shop.statistics(shape, tuned))
            models.append({"model": str(shop.model(shape, tuned)), "parameters": parameters})
        config = {
            "merge_method": method,
            "base_model": str(shop.model(shape)),
            "models": models,
            "dtype": "bfloat16",
        }
        with shop.scratch() as scratch:
            return shop.launch("merge", config=config, out=str(scratch / "merged"))

    return compare(
        "merge-regmean",
        Side("regmean", lambda: merge("regmean", True)),
        Side("task_arithmetic", lambda: merge("task_arithmetic", False)),
        {TIME: None, WALL: 2.5, PROCESSOR: None, MEMORY: 1.3},
        rounds=shop.rounds,
        warm_up=not shop.quick,
    )


BENCHMARKS = {"merge-regmean": merge_regmean}
TASKS = ()
