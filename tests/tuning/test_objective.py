"""Gains, their mean, the front and its volume: against definitions written out."""

from __future__ import annotations

import itertools
import random

import pytest

from mergekit_arm.judging.sets import HeldOutSet, MetricSet
from mergekit_arm.tuning.objective import front, hypervolume, weighted_mean, yardstick

SETS = {
    "loss": HeldOutSet(dataset="x"),
    "accuracy": MetricSet(metric_command="{model}", goal="maximize", weight=3),
}


def test_the_base_is_zero_and_the_best_input_one() -> None:
    base = {"loss": 3.0, "accuracy": 0.2}
    inputs = [{"loss": 2.0, "accuracy": 0.1}, {"loss": 2.5, "accuracy": 0.6}]
    measure = yardstick(SETS, base, inputs)
    assert measure.gains(base) == {"loss": 0, "accuracy": 0}
    assert measure.gains({"loss": 2.0, "accuracy": 0.6}) == pytest.approx(
        {"loss": 1, "accuracy": 1}
    )
    found = measure.gains({"loss": 3.5, "accuracy": 0.8})
    assert found == pytest.approx({"loss": -0.5, "accuracy": 1.5})
    assert weighted_mean(found, SETS) == pytest.approx((-0.5 + 3 * 1.5) / 4)


def test_inputs_that_gain_nothing_still_measure() -> None:
    base = {"loss": 2.0, "accuracy": 0.5}
    worse = [{"loss": 2.1, "accuracy": 0.5}, {"loss": 2.4, "accuracy": 0.5}]
    measure = yardstick(SETS, base, worse)
    # The input that differs most is 0.4 away; of accuracies that are all 0.5, one is 0.5.
    assert measure.gains({"loss": 1.8, "accuracy": 0.75}) == pytest.approx(
        {"loss": 0.5, "accuracy": 0.5}
    )


def test_without_a_base_the_inputs_mean_is_zero() -> None:
    inputs = [{"loss": 2.0, "accuracy": 0.4}, {"loss": 3.0, "accuracy": 0.6}]
    measure = yardstick(SETS, None, inputs)
    assert measure.gains({"loss": 2.5, "accuracy": 0.5}) == pytest.approx(
        {"loss": 0, "accuracy": 0}
    )
    assert measure.gains({"loss": 2.0, "accuracy": 0.6}) == pytest.approx(
        {"loss": 1, "accuracy": 1}
    )


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_volume_is_that_of_cells(axes: int) -> None:
    """Points on a lattice: cells below any of them are counted one by one."""
    draw = random.Random(axes)
    for _ in range(30):
        points = [[draw.randint(-2, 6) for _ in range(axes)] for _ in range(draw.randint(1, 7))]
        cells = sum(
            any(all(c < p for c, p in zip(cell, point, strict=True)) for point in points)
            for cell in itertools.product(range(6), repeat=axes)
        )
        assert hypervolume(points) == pytest.approx(cells)
        kept = [points[i] for i in front(points)]
        assert hypervolume(kept) == pytest.approx(cells)


def test_the_front_keeps_equals_and_drops_what_is_exceeded() -> None:
    points = [(1.0, 2.0), (2.0, 1.0), (1.0, 2.0), (1.0, 1.0), (2.0, 0.5)]
    assert front(points) == [0, 1, 2]
    assert front([]) == []
    assert hypervolume([]) == 0
