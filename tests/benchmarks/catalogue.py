"""Every benchmark and every task, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.benchmarks.groups import (
    authors,
    building,
    calibration,
    eigenvectors,
    kernels,
    merging,
    regmean,
    start_up,
    streaming,
    tuning,
)
from tests.benchmarks.harness import Row
from tests.benchmarks.inputs import Workshop

_COMPARED = (
    calibration,
    merging,
    regmean,
    streaming,
    tuning,
    authors,
    start_up,
    kernels,
    eigenvectors,
)

BENCHMARKS: dict[str, Callable[[Workshop], list[Row]]] = {
    name: run for group in _COMPARED for name, run in group.BENCHMARKS.items()
}
ON_REQUEST = ("merge-every-aim",)
"""Run only when named."""
TASKS: dict[str, Callable[..., Any]] = {
    task.__name__: task for group in (building, *_COMPARED) for task in group.TASKS
}
