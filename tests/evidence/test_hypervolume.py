"""The hypervolume against counting, and what a gain must do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evidence.hypervolume import gain, gains, hypervolume

SHARES = st.integers(0, 5)


@given(st.lists(st.tuples(SHARES, SHARES, SHARES), max_size=6))
def test_the_volume_is_the_number_of_cells_that_are_dominated(
    points: list[tuple[int, ...]],
) -> None:
    cells = np.stack(np.meshgrid(*[np.arange(5)] * 3, indexing="ij"), -1).reshape(-1, 3)
    dominated = np.zeros(len(cells), dtype=bool)
    for point in points:
        dominated |= (cells < np.array(point)).all(1)
    assert hypervolume(points) == pytest.approx(dominated.sum())


def test_a_merge_gains_what_no_input_has() -> None:
    inputs = [(0.0, 0.0, 0.4), (0.8, 0.0, 0.2), (0.0, 0.5, 0.2)]
    assert gain(inputs, (0.8, 0.0, 0.2)) == pytest.approx(0)
    # The whole box, of which two specialists and a base without any answer have nothing.
    assert gain(inputs, (0.8, 0.5, 0.4)) == pytest.approx(1)
    assert gain(inputs, (0.4, 0.25, 0.2)) == pytest.approx(1 / 8)


def test_gains_are_of_merges_and_need_all_inputs() -> None:
    line = {"exact": "1100", "general": [2.0, 4.0]}
    group = {"base": {**line, "exact": "0000"}, "a": {**line, "exact": "1100"}, "merge": line}
    assert gains(group, ["a", "b"]) == {}
    group["b"] = {**line, "exact": "0011"}
    group["both"] = {**line, "exact": "1010"}
    assert gains(group, ["a", "b"]) == pytest.approx({"merge": 0.0, "both": 0.25})
