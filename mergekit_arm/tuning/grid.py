"""A grid over everything that a search may try."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_arm.errors import InputError
from mergekit_arm.tuning.search import Candidates
from mergekit_arm.tuning.space import Value


def grid(candidates: Candidates, budget: int) -> list[tuple[str, dict[str, Value]]]:
    """Return the finest grid of at most ``budget`` points: ranges at equal distances.

    Raises:
        InputError: the coarsest, of both ends of every range, has more.
    """
    best = None
    for count in range(2, budget + 2):
        found = [
            (method, point)
            for method, domains in candidates.methods.items()
            for point in _product({name: one.points(count) for name, one in domains.items()})
        ]
        if len(found) > budget:
            if best is None:
                raise InputError(
                    f"a grid of every choice and the ends of every range has {len(found)} points: "
                    f"raise trials ({budget}), or use another sampler"
                )
            break
        if best is not None and len(found) == len(best):
            break  # choices and narrow whole numbers have no finer grid
        best = found
    assert best is not None
    return best


def _product(values: Mapping[str, list[Value]]) -> list[dict[str, Value]]:
    points: list[dict[str, Value]] = [{}]
    for name, options in values.items():
        points = [{**point, name: value} for point in points for value in options]
    return points
