"""``stream.png``: losses, learning rates and the size of the updates, step by step."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mergekit_arm.files import write_bytes
from mergekit_arm.streaming.judge import Score
from mergekit_arm.streaming.state import State, StepRecord

# Okabe and Ito's colours, which people with any colour vision tell apart.
_CURRENT, _CHECKPOINT, _BASE = "#0072B2", "#E69F00", "#555555"


def draw_stream(state: State, path: Path) -> None:
    """Draw all steps so far to ``path``, replaced as a whole.

    No times are in it: the same stream, the same picture.
    """
    scored = [which for which in ("loss", "metric") if _has(state, which)]
    moves = [move for move in _moves(state.steps) if move[1]]
    heights = [2.4] * len(scored) + [1.2] * len(moves)
    figure = Figure(figsize=(8, sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    remaining = list(panels[:, 0])
    for which in scored:
        _draw_scores(remaining.pop(0), state, which)
    for label, points in moves:
        axes = remaining.pop(0)
        axes.plot(*zip(*points, strict=True), "o-", color=_CURRENT, ms=4)
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.1 * max(value for _, value in points) or 1)
    panels[-1, 0].set_xlabel("step")
    panels[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=120, metadata={"Software": None})
    write_bytes(path, drawn.getvalue())


def _has(state: State, which: str) -> bool:
    return state.base is not None and getattr(state.base, which) is not None


def _moves(records: list[StepRecord]) -> list[tuple[str, list[tuple[int, float]]]]:
    rates = [(r.step, r.learning_rate) for r in records if r.learning_rate is not None]
    turned = [(r.step, r.rotation_degrees["mean"]) for r in records if r.rotation_degrees]
    return [
        ("learning rate", rates),
        ("‖update‖", [(r.step, r.update_norm) for r in records] or [(0, 0.0)]),
        ("rotation (°)", turned if any(angle > 0.01 for _, angle in turned) else []),
    ]


def _draw_scores(axes: Axes, state: State, which: str) -> None:
    records = state.steps
    base = getattr(state.base or Score(), which)
    steps = [0, *(record.step for record in records)]
    values = [base, *(getattr(record.current, which) for record in records)]
    axes.axhline(base, color=_BASE, linestyle=":", label="base")
    latest = [(r.step, getattr(r.latest_checkpoint, which)) for r in records]
    latest = [(step, value) for step, value in latest if value is not None]
    if latest:
        axes.plot(*zip(*latest, strict=True), "s--", color=_CHECKPOINT, label="checkpoint", ms=4)
    axes.plot(steps, values, "o-", color=_CURRENT, label="merged", ms=4)
    best = records[-1].best_step if records else 0
    axes.plot(best, values[best], "*", color=_CURRENT, ms=13, label=f"best: step {best}")
    axes.set_ylabel("loss (nats per token)" if which == "loss" else "metric")
    axes.legend(fontsize="small")
