"""The page on a stream: every step's scores, rates, size and direction."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mergekit_arm.reporting.drawings import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    Curve,
    Drawing,
    curves,
)
from mergekit_arm.reporting.page import Grid, Page
from mergekit_arm.streaming.report.card import STEPS, step_rows
from mergekit_arm.streaming.state import State, StepRecord

_TURNED = 0.01
"""Degrees below which a step is not said to have turned."""


def stream_page(out: Path, state: State) -> Page:
    """Return the page on the stream in ``out``, finished or not."""
    notes = []
    if not state.steps:
        notes.append("No step has been made yet.")
    if state.stopped is None:
        notes.append("The stream has not ended: the same command continues it.")
    if state.steps and not state.base:
        notes.append("The configuration names nothing to judge by, so that there are no scores.")
    notes += [f"{one.checkpoint} could not be merged: {one.reason}" for one in state.skipped]
    header = (*STEPS, *(state.base or {}))
    drawings = [_scores(state, name, number) for number, name in enumerate(state.base or {}, 1)]
    return Page(
        title=f"A stream of {len(state.steps)} steps: {out.name}",
        facts=list(_facts(out, state)),
        drawings=[*drawings, *_moves(state.steps)],
        notes=notes,
        tables=[Grid("Steps", header, list(step_rows(state)))] if state.steps else [],
    )


def _scores(state: State, name: str, number: int) -> Drawing:
    base = (state.base or {})[name]
    last = len(state.steps)
    merged = [(0, base), *((r.step, r.current[name]) for r in state.steps if name in r.current)]
    texts = ["base"] + [
        f"step {r.step}, {r.checkpoint}: {r.current[name]:.4f}"
        for r in state.steps
        if name in r.current
    ]
    scored = [(r, one) for r in state.steps for one in r.merged if name in one.scores]
    lines = [Curve("base", [(0, base), (last, base)], GREY, "dot", "lines")]
    if scored:
        points = [(r.step, one.scores[name]) for r, one in scored]
        said = [f"{one.name} as it is: {one.scores[name]:.4f}" for _, one in scored]
        lines.append(Curve("checkpoint", points, ORANGE, "dash", symbol="square", texts=said))
    average = state.average
    if average is not None and name in average.scores:
        level = average.scores[name]
        lines.append(
            Curve("average of the checkpoints", [(0, level), (last, level)], GREEN, "dashdot",
                  "lines")
        )  # fmt: skip
    lines.append(Curve("merged", merged, BLUE, texts=texts))
    best = dict(merged).get(state.best)
    if best is not None:
        said = [f"best: step {state.best}, {best:.4f}"]
        lines.append(Curve("best", [(state.best, best)], RED, mode="markers", symbol="star",
                           size=13, texts=said))  # fmt: skip
    facts = state.data.get(name)
    what = f"The number of a command, {name}"
    if facts is not None:
        what = f"The loss on {name}, in nats per token over {facts.get('tokens', 0):,} tokens"
    return curves(
        f"scores-{number}",
        f"Score by step: {name}",
        f"{what}: of the running model after each step, beside each checkpoint as it is.",
        lines,
        "step",
        name if facts is None else f"{name} (nats per token)",
    )


def _moves(records: list[StepRecord]) -> Iterator[Drawing]:
    rates = [(r.step, r.learning_rate) for r in records if isinstance(r.learning_rate, float)]
    if rates:
        yield curves(
            "rates", "Learning rate by step", "The merging coefficient with which each step was "
            "made.", [Curve("learning rate", rates)], "step", "learning rate", from_zero=True,
        )  # fmt: skip
    updates = [(r.step, r.update_norm) for r in records if r.update_norm is not None]
    tasks = [(r.step, r.task_norm) for r in records if r.task_norm is not None]
    if updates:
        yield curves(
            "updates", "How far each step went",
            "Frobenius norms over all weights: of the step's update, and of the task vector, from "
            "the running model to the checkpoint, along which it went.",
            [Curve("update", updates), Curve("task vector", tasks)],
            "step", "norm", from_zero=True,
        )  # fmt: skip
    turned = [(r.step, r.rotation_degrees) for r in records if r.rotation_degrees]
    if any(angles["mean"] > _TURNED for _, angles in turned):
        yield curves(
            "rotation", "Rotation by step",
            "The angle between a step's update and its task vector, over the matrices: how far the "
            "method turned the step.",
            [Curve(which, [(step, angles[key]) for step, angles in turned])
             for which, key in (("mean", "mean"), ("largest", "max"))],
            "step", "degrees", from_zero=True,
        )  # fmt: skip


def _facts(out: Path, state: State) -> Iterator[tuple[str, str]]:
    yield "directory", str(out)
    yield "steps", f"{len(state.steps)}, of which {sum(r.accepted for r in state.steps)} accepted"
    if state.stopped is not None:
        yield "ended", state.stopped
    if state.chosen is not None:
        yield (
            "model",
            f"step {state.chosen}" if state.chosen else "the base, which no step bettered",
        )
    elif state.base:
        yield "best so far", f"step {state.best}" if state.best else "the base"
    for name, facts in state.data.items():
        yield name, f"{facts.get('tokens', 0):,} tokens, SHA-256 {str(facts.get('sha256'))[:16]}"
    if state.average is not None and state.average.missing:
        yield "average of the checkpoints", f"not scored: {state.average.missing}"
