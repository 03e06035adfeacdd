"""How much a merge adds to what its inputs offer together: AIM's hypervolume gain.

A model is a point: the share of exact answers on each task, and the mean likelihood of a token of
general text (the exponential of the negated loss), each divided by the best of the base and the
specialists. These are the population; a merge's gain is the volume that it dominates and no model
of the population does, measured from the origin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp
from statistics import fmean
from typing import Any

Point = Sequence[float]


def hypervolume(points: Sequence[Point]) -> float:
    """Return the volume of all that lies between the origin and at least one of the points.

    Cut into slabs along the last axis; within one, the points that reach it are what matters.
    """
    if not points:
        return 0.0
    if len(points[0]) == 1:
        return max(max(point[0] for point in points), 0.0)
    volume, below = 0.0, 0.0
    for height in sorted({point[-1] for point in points if point[-1] > 0}):
        reaching = [point[:-1] for point in points if point[-1] >= height]
        volume += (height - below) * hypervolume(reaching)
        below = height
    return volume


def gain(population: Sequence[Point], merged: Point) -> float:
    """Return what ``merged`` adds, each axis in units of the population's best."""
    best = [max(axis) or 1.0 for axis in zip(*population, strict=True)]

    def scaled(point: Point) -> list[float]:
        return [value / unit for value, unit in zip(point, best, strict=True)]

    known = [scaled(point) for point in population]
    return hypervolume([*known, scaled(merged)]) - hypervolume(known)


def point(line: Mapping[str, Any], tasks: int) -> list[float]:
    """Return a model's place, from its line of the test split."""
    size = len(line["exact"]) // tasks
    shares = [line["exact"][n * size : (n + 1) * size].count("1") / size for n in range(tasks)]
    return [*shares, exp(-fmean(line["general"]))]


def gains(group: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, float]:
    """Return the gain of every merge of a group; none while base or specialists are missing.

    The line of a specialist has its task for a label; one task's run has none.
    """
    inputs = ("base", *tasks)
    if any(name not in group for name in inputs):
        return {}
    population = [point(group[name], len(tasks)) for name in inputs]
    return {
        label: gain(population, point(line, len(tasks)))
        for label, line in group.items()
        if label not in inputs
    }
