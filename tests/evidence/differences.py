"""How far models are apart, over all runs of a study."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, stdev

from tests.evidence.hypervolume import gains
from tests.evidence.intervals import Difference, paired
from tests.evidence.units import Line

Group = dict[str, Line]
"""Label → the line of one part, of one run or pair."""


def over_runs(groups: Mapping[str, Group], label: str, reference: str) -> list[Difference]:
    """Return a model's loss less the reference's, for every run that has both."""
    return [
        paired(group[label]["losses"], group[reference]["losses"])
        for group in groups.values()
        if label in group and reference in group
    ]


def apart(
    groups: Mapping[str, Group], label: str, reference: str, quantity: str = "losses"
) -> list[float]:
    """Return how much more of a quantity a model has than the reference, in every run with both."""
    return [
        mean_of(group[label], quantity) - mean_of(group[reference], quantity)
        for group in groups.values()
        if label in group and reference in group
    ]


def volumes_apart(groups: Mapping[str, Group], label: str, reference: str) -> list[float]:
    """Return how much larger a merge's hypervolume gain is than the reference's."""
    found = [gains(group, tasks_of(name)) for name, group in groups.items()]
    return [one[label] - one[reference] for one in found if label in one and reference in one]


def tasks_of(name: str) -> list[str]:
    """Return the tasks of a run or pair, ``a+b, seed 0``."""
    return name.partition(",")[0].split("+")


def mean_of(line: Line, quantity: str) -> float:
    """Return the mean over examples, or over marks, of what a line keeps."""
    return fmean(map(float, line[quantity]))


def spread(values: list[float]) -> str:
    """Return a mean over runs ± their standard deviation."""
    if not values:
        return ""
    around = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):+.3f}{around}"
