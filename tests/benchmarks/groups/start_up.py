"""Two times that have a limit: Python's start with the import hook, and ``--help``."""

from __future__ import annotations

import sys
from statistics import median

from tests.benchmarks.harness import PROCESSOR, Measured, Row, Side, compare, start
from tests.benchmarks.inputs import Workshop


def start_up(shop: Workshop) -> list[Row]:
    """Two times that have a limit: Python's start with the import hook, and ``--help``."""
    python, rounds = [sys.executable, "-c", "pass"], 1 if shop.quick else 41

    def hook() -> Measured:
        # Pairs and their median, for what else the machine is doing.
        extra = median(
            start(python, MERGEKIT_ARM_AUTOLOAD="1")[PROCESSOR]
            - start(python, MERGEKIT_ARM_AUTOLOAD="0")[PROCESSOR]
            for _ in range(rounds)
        )
        return {PROCESSOR: max(extra, 1e-6)}

    command = [sys.executable, "-m", "mergekit_arm", "--help"]
    found = []
    for label, run, limit in (
        ("the import hook", hook, 0.003),
        ("mergekit-arm --help", lambda: start(command), 0.5),
    ):
        found += compare(
            f"start-up: {label}",
            Side(label, run),
            Side(f"{limit} s", lambda limit=limit: {PROCESSOR: limit}),
            {PROCESSOR: 1.0},
            rounds=shop.rounds,
        )
    return found


BENCHMARKS = {"start-up": start_up}
TASKS = ()
