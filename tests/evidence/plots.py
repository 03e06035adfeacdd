"""A picture of a study: what each model gains on the task, and what it forgets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from tests.evidence.differences import tasks_of

Lines = Mapping[str, Mapping[str, Any]]


def distances(groups: Mapping[str, Lines], reference: str) -> dict[str, list[tuple[float, float]]]:
    """Return label → for every run: the loss on general text and on the task, less the reference's.

    What goes into a merge is left out, the base and specialists: their losses on tasks that they
    have not learnt are far from all others.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for name, group in groups.items():
        inputs = ("base", *tasks_of(name))
        if reference not in group:
            continue
        origin = [fmean(group[reference][quantity]) for quantity in ("general", "losses")]
        for label, line in group.items():
            if label not in inputs:
                general, loss = (fmean(line[quantity]) for quantity in ("general", "losses"))
                found.setdefault(label, []).append((general - origin[0], loss - origin[1]))
    return found


def draw(title: str, groups: Mapping[str, Lines], reference: str, out: Path) -> None:
    """Draw one point a run and model; down and left is better."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    markers = "osD^v<>PX*hpd"
    for number, (label, points) in enumerate(distances(groups, reference).items()):
        general, loss = zip(*points, strict=True)
        axes.scatter(general, loss, label=label, marker=markers[number % len(markers)], alpha=0.8)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.set_title(title)
    axes.set_xlabel(f"loss on general text, less that of {reference}")
    axes.set_ylabel(f"loss on the task, less that of {reference}")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(out, dpi=110, metadata={"Software": None})
