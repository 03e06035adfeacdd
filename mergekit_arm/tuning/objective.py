"""One number, or several, for how good a model is beside its base and the models it is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit_arm.judging.judge import Scores
from mergekit_arm.judging.sets import EvaluationSet


@dataclass(frozen=True)
class Yardstick:
    """What models are measured against: 0 is the base, 1 the best input model, on every set."""

    zero: Scores
    """Where there is no base model, the inputs' mean."""
    scale: Scores
    """By how much a score is better at 1 than at 0; negative where less is better."""

    def gains(self, scores: Scores) -> Scores:
        """Return how much better than the base a model is, in what the best input gains."""
        return {
            name: (score - self.zero[name]) / self.scale[name] for name, score in scores.items()
        }


def yardstick(
    sets: Mapping[str, EvaluationSet], base: Scores | None, inputs: Sequence[Scores]
) -> Yardstick:
    """Return the measure that the scores of the base and of the inputs give.

    Where no input is better than the base on a set, 1 is as far above the base as the input
    that differs most is from it; where all score the same, as far as the score is from zero.
    """
    zero: Scores = {}
    scale: Scores = {}
    for name, one in sets.items():
        sign = -1.0 if one.goal == "minimize" else 1.0
        found = [scores[name] for scores in inputs]
        zero[name] = base[name] if base is not None else math.fsum(found) / len(found)
        gains = [sign * (score - zero[name]) for score in found]
        best = max(gains, default=0.0)
        if best <= 0:
            best = max(map(abs, gains), default=0.0) or abs(zero[name]) or 1.0
        scale[name] = sign * best
    return Yardstick(zero, scale)


def weighted_mean(gains: Scores, sets: Mapping[str, EvaluationSet]) -> float:
    """Return the mean of gains by the sets' weights."""
    total = math.fsum(sets[name].weight for name in gains)
    return math.fsum(sets[name].weight * gain for name, gain in gains.items()) / total


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the points that no other exceeds: larger is better everywhere."""
    return [
        index
        for index, one in enumerate(points)
        if not any(
            all(b >= a for a, b in zip(one, other, strict=True)) and tuple(other) != tuple(one)
            for other in points
        )
    ]


def hypervolume(points: Sequence[Sequence[float]]) -> float:
    """Return the volume between the origin, which is the base, and the points' front.

    Points that are below the base anywhere add nothing. Slices along the last axis, so that the
    time grows by a factor of the number of points with every axis.
    """
    above = [tuple(point) for point in points if all(value > 0 for value in point)]
    if not above:
        return 0.0
    if len(above[0]) == 1:
        return max(point[0] for point in above)
    heights = sorted({point[-1] for point in above})
    volume, below = 0.0, 0.0
    for height in heights:
        slab = [point[:-1] for point in above if point[-1] >= height]
        volume += (height - below) * hypervolume(slab)
        below = height
    return volume
