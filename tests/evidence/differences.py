"""How far models are apart, over all runs of a study."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, stdev

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


def mean_of(line: Line, quantity: str) -> float:
    """Return the mean over examples, or over marks, of what a line keeps."""
    return fmean(map(float, line[quantity]))


def spread(values: list[float]) -> str:
    """Return a mean over runs ± their standard deviation."""
    if not values:
        return ""
    around = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):+.3f}{around}"
