"""Averages of a run's checkpoints, which merge methods are compared with and build upon."""

from __future__ import annotations

from math import exp

from tests.evidence.sizes import FRACTIONS

MEMORY = 0.25
"""The part of a run over which an exponential average forgets to 1/e."""


def _exponential() -> dict[float, float]:
    gaps = [after - before for before, after in zip((0.0, *FRACTIONS), FRACTIONS, strict=False)]
    return {f: gap * exp((f - 1) / MEMORY) for f, gap in zip(FRACTIONS, gaps, strict=True)}


AVERAGES: dict[str, dict[float, float]] = {
    "early": {0.15: 1, 0.20: 1, 0.25: 1},
    "late": {0.50: 1, 0.75: 1, 1.0: 1},
    "exponential": _exponential(),
}
"""Name → part of the run → weight. ``late`` is LAWA (latest weights averaged), ``exponential`` an
exponential moving average of what was kept: each checkpoint stands for the time since the last."""
