"""``tune.png``: gains by trial, which parameters matter, and with several objectives the front."""

from __future__ import annotations

from pathlib import Path

import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.study import Study
from optuna.trial import TrialState

from mergekit_arm.merging.picture import save_drawing
from mergekit_arm.tuning.trials import TrialRecord, completed, front_of

# Okabe and Ito's colours, which people with any colour vision tell apart.
_TRIAL, _PRUNED, _REFERENCE, _BEST = "#0072B2", "#999999", "#E69F00", "#D55E00"
_FEWEST = 10
"""Trials from which on a parameter's importance says anything."""


def draw_tuning(found: list[TrialRecord], weights: dict[str, float], path: Path) -> None:
    """Draw all trials so far to ``path``, replaced as a whole.

    ``weights``: how much each parameter matters, as :func:`importances` says.
    """
    save_drawing(lambda: _figure(found, weights), path)


def _figure(found: list[TrialRecord], weights: dict[str, float]) -> Figure:
    sets = list(completed(found, "tune")[0].gains) if completed(found, "tune") else []
    panels = 1 + bool(weights) + (len(sets) > 1)
    figure = Figure(figsize=(8, 3.2 * panels), layout="constrained")
    axes = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
    _draw_trials(axes.pop(0), found)
    if weights:
        _draw_importances(axes.pop(0), weights)
    if len(sets) > 1:
        _draw_front(axes.pop(0), found, sets[0], sets[1])
    return figure


def importances(study: Study) -> dict[str, float]:
    """Return how much each parameter decides whether a trial is among the best, largest first.

    The numbers add up to 1 (PED-ANOVA, arXiv 2304.10255); of several objectives, the best are
    those near the front.
    Empty where nothing can be told: too few trials, or no parameter that all of them have.
    """
    if sum(1 for one in study.trials if one.state == TrialState.COMPLETE) < _FEWEST:
        return {}
    try:
        return dict(
            optuna.importance.get_param_importances(
                study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
            )
        )
    except (ValueError, RuntimeError, ImportError):
        return {}


def _draw_trials(axes: Axes, found: list[TrialRecord]) -> None:
    whole = completed(found, "tune")
    axes.axhline(0, color=_REFERENCE, linestyle=":", label="base")
    axes.axhline(1, color=_REFERENCE, linestyle="--", label="best input")
    baseline = [one.gain for one in completed(found, "baseline") if one.gain is not None]
    if baseline:
        axes.axhline(max(baseline), color="#555555", linestyle="-.", label="task arithmetic")
    pruned = [one for one in found if one.study == "tune" and one.outcome == "pruned"]
    for group, colour, label in ((pruned, _PRUNED, "given up"), (whole, _TRIAL, "trial")):
        points = [(one.number, one.gain) for one in group]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=colour, ms=4, label=label)
    best: list[tuple[int, float]] = []
    for one in whole:
        assert one.gain is not None  # it is complete
        best.append((one.number, max([one.gain, *(gain for _, gain in best)])))
    if best:
        axes.step(*zip(*best, strict=True), where="post", color=_BEST, label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel("gain over the base")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize="small")


def _draw_importances(axes: Axes, weights: dict[str, float]) -> None:
    names = list(weights)[::-1][-12:]
    axes.barh(names, [weights[name] for name in names], color=_TRIAL)
    axes.set_xlabel("importance: how much it decides which trials are best")


def _draw_front(axes: Axes, found: list[TrialRecord], first: str, second: str) -> None:
    whole = completed(found, "tune")
    best = front_of(whole)
    for group, colour, label in ((whole, _TRIAL, "trial"), (best, _BEST, "front")):
        points = [(one.gains[first], one.gains[second]) for one in group]
        axes.plot(*zip(*points, strict=True), "o", color=colour, ms=4, label=label)
    axes.plot(0, 0, "s", color=_REFERENCE, label="base")
    axes.set_xlabel(f"gain on {first}")
    axes.set_ylabel(f"gain on {second}")
    axes.legend(fontsize="small")
