"""``stream.png``: scores, learning rates and the size of the updates, step by step."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mergekit_arm.merging.picture import save_drawing
from mergekit_arm.streaming.state import State, StepRecord
from mergekit_arm.streaming.verdict import LOSS, Evaluation

# Okabe and Ito's colours, which people with any colour vision tell apart.
_CURRENT, _CHECKPOINT, _BASE, _BOUND = "#0072B2", "#E69F00", "#555555", "#D55E00"


def draw_stream(state: State, evaluation: Evaluation | None, path: Path) -> None:
    """Draw all steps so far to ``path``, replaced as a whole; a panel for every evaluation set.

    No times are in it: the same stream, the same picture.
    """
    save_drawing(lambda: _figure(state, evaluation), path)


def _figure(state: State, evaluation: Evaluation | None) -> Figure:
    scored = list(state.base or {}) if evaluation is not None else []
    moves = [move for move in _moves(state.steps) if move[1]]
    heights = [2.4] * len(scored) + [1.2] * len(moves)
    figure = Figure(figsize=(8, sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    remaining = list(panels[:, 0])
    for name in scored:
        assert evaluation is not None
        _draw_scores(remaining.pop(0), state, name, evaluation.sets[name].at_most)
    for label, points in moves:
        axes = remaining.pop(0)
        axes.plot(*zip(*points, strict=True), "o-", color=_CURRENT, ms=4)
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.1 * max(value for _, value in points) or 1)
    panels[-1, 0].set_xlabel("step")
    panels[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _moves(records: list[StepRecord]) -> list[tuple[str, list[tuple[int, float]]]]:
    rates = [(r.step, r.learning_rate) for r in records if isinstance(r.learning_rate, float)]
    turned = [(r.step, r.rotation_degrees["mean"]) for r in records if r.rotation_degrees]
    updates = [(r.step, r.update_norm) for r in records if r.update_norm is not None]
    found = [
        ("learning rate", rates),
        ("‖update‖", updates),
        ("rotation (°)", turned if any(angle > 0.01 for _, angle in turned) else []),
    ]
    return found if any(points for _, points in found) else [("step", [(0, 0.0)])]


def _draw_scores(axes: Axes, state: State, name: str, bound: float | None) -> None:
    records, base = state.steps, (state.base or {})[name]
    points = [(0, base), *((r.step, r.current[name]) for r in records if name in r.current)]
    axes.axhline(base, color=_BASE, linestyle=":", label="base")
    if bound is not None:
        axes.axhline(base + bound, color=_BOUND, linestyle="-.", label=f"at most +{bound:g}")
    latest = [(r.step, one.scores[name]) for r in records for one in r.merged if name in one.scores]
    if latest:
        axes.plot(*zip(*latest, strict=True), "s--", color=_CHECKPOINT, label="checkpoint", ms=4)
    axes.plot(*zip(*points, strict=True), "o-", color=_CURRENT, label="merged", ms=4)
    best = dict(points).get(state.best)
    if best is not None:
        label = f"best: step {state.best}"
        axes.plot(state.best, best, "*", color=_CURRENT, ms=13, label=label)
    axes.set_ylabel("loss (nats per token)" if name == LOSS else name)
    axes.legend(fontsize="small")
