"""``stream.png``: losses, learning rates and the size of the updates, step by step."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mergekit_arm.streaming.state import Losses, State, StepRecord

# Okabe and Ito's colours, which people with any colour vision tell apart.
_CURRENT, _CHECKPOINT, _BASE, _EXTRA = "#0072B2", "#E69F00", "#555555", "#CC79A7"


def draw_stream(state: State, path: Path) -> None:
    """Draw all steps so far to ``path``, replaced as a whole. No times: the same stream, the
    same picture."""
    records = state.steps
    scored = [which for which in ("loss", "metric") if _has(state, which)]
    figure = Figure(figsize=(8, 2.4 * (len(scored) + 1) + 0.6), layout="constrained")
    panels = figure.subplots(len(scored) + 1, 1, sharex=True, squeeze=False)[:, 0]
    for axes, which in zip(panels, scored, strict=False):
        _draw_scores(axes, state, which)
    _draw_moves(panels[-1], records)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=120, metadata={"Software": None})
    os.replace(partial, path)


def _has(state: State, which: str) -> bool:
    return state.base is not None and getattr(state.base, which) is not None


def _draw_scores(axes: Axes, state: State, which: str) -> None:
    records = state.steps
    base = getattr(state.base or Losses(), which)
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


def _draw_moves(axes: Axes, records: list[StepRecord]) -> None:
    steps = [record.step for record in records]
    axes.plot(steps, [r.update_norm for r in records], "o-", color=_CURRENT, ms=4)
    axes.set_ylabel("‖update‖", color=_CURRENT)
    axes.set_ylim(bottom=0)
    rates = [(r.step, r.learning_rate) for r in records if r.learning_rate is not None]
    turned = [(r.step, r.rotation_degrees["mean"]) for r in records if r.rotation_degrees]
    if rates:
        other = axes.twinx()
        other.plot(*zip(*rates, strict=True), "s--", color=_CHECKPOINT, ms=4)
        other.set_ylabel("learning rate", color=_CHECKPOINT)
        other.set_ylim(bottom=0)
    if turned:
        angles = axes.twinx()
        angles.spines["right"].set_position(("axes", 1.1))
        angles.plot(*zip(*turned, strict=True), "^:", color=_EXTRA, ms=4)
        angles.set_ylabel("mean rotation (°)", color=_EXTRA)
        angles.set_ylim(bottom=0)
