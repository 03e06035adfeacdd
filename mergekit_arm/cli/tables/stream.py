"""What ``mergekit-arm stream`` prints: the plan, a line a step, the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mergekit_arm.judging.judge import Scores
from mergekit_arm.streaming.forecast import Forecast
from mergekit_arm.streaming.rates import rate_text
from mergekit_arm.streaming.state import StepRecord
from mergekit_arm.streaming.stream import StreamResult
from mergekit_arm.units import duration_text, size_text


def plan_report(forecast: Forecast) -> Iterator[RenderableType]:
    """Yield what a dry run shows."""
    plan, needs = forecast.plan, forecast.needs
    if plan is not None and plan.checkpoints is not None:
        table = Table(title=f"A stream of {plan.length} steps with {plan.method.name}")
        for column in ("step", "checkpoint", "learning rate", "calibrates"):
            table.add_column(column)
        handled = forecast.state.handled if forecast.state else []
        for one in handled:
            done = f"{one.step} (done)" if isinstance(one, StepRecord) else "skipped"
            planned = rate_text(one.learning_rate) if isinstance(one, StepRecord) else ""
            table.add_row(done, Text(one.checkpoint), planned, "")
        for step in plan.steps(forecast.state):
            search = " or ".join(["0", *map(rate_text, step.search)]) if step.search else ""
            rate = search or ", ".join(map(rate_text, step.rates or []))
            measures = "yes" if step.measures else ""
            table.add_row(str(step.step), Text(step.name), rate, measures)
        yield table
    elif plan is not None:
        yield Text(f"Follows {plan.config.checkpoints}; the number of steps is not known yet.")
    if needs is not None:
        if forecast.seconds == 0:
            yield Text("time     none: every step is done")
        elif forecast.seconds is not None:
            yield Text(f"time     about {duration_text(forecast.seconds)} more, by the steps done")
        else:
            yield Text("time     known once a step is done: run the same dry run again then")
        yield Text(f"disk     about {size_text(needs.disk)}, {size_text(needs.disk_free)} free")
        memory = f"about {size_text(needs.memory)} for a merge"
        yield Text(f"memory   {memory}, {size_text(needs.memory_free)} free")
    for note in plan.notes if plan is not None else []:
        yield Text(f"note: {note}", style="yellow")
    for problem in forecast.problems:
        yield Text(f"wrong: {problem}", style="red")
    if not forecast.problems:
        yield Text("nothing is wrong", style="green")


def plan_fields(forecast: Forecast) -> dict[str, Any]:
    """Return what a dry run shows, as JSON has it."""
    plan, state = forecast.plan, forecast.state
    steps = None
    if plan is not None and plan.checkpoints is not None:
        steps = [
            {
                "step": one.step,
                "checkpoint": one.name,
                "learning_rate": one.planned,
                "calibrates": one.measures,
            }
            for one in plan.steps(state)
        ]
    return {
        "method": plan.method.name if plan is not None else None,
        "done": len(state.steps) if state else 0,
        "steps": steps,
        "seconds": forecast.seconds,
        "needs": forecast.needs,
        "notes": plan.notes if plan is not None else [],
        "problems": forecast.problems,
    }


def step_line(record: StepRecord) -> str:
    """Return one line about a committed step."""
    parts = [f"step {record.step}", record.checkpoint]
    if record.learning_rate is not None:
        parts.append(f"η {rate_text(record.learning_rate)}")
    if record.update_norm is not None:
        parts.append(f"‖update‖ {record.update_norm:.3g}")
    if record.rotation_degrees:
        parts.append(f"turned {record.rotation_degrees['mean']:.1f}°")
    parts += _scores("merged", record.current)
    for one in record.merged:
        parts += _scores("checkpoint", one.scores)
    if len(record.tried) > 1:
        parts.append(f"{len(record.tried)} rates tried")
    if not record.accepted:
        parts.append("not merged: worse at every rate")
    parts.append(f"{sum(record.seconds.values()):.1f} s")
    return "  ".join(parts)


def stream_summary(result: StreamResult) -> Table:
    """Return the table that ends a stream."""
    table = Table(title="The stream has ended", show_header=False)
    table.add_row("steps", f"{len(result.steps)}: {result.stopped}")
    for skipped in result.skipped:
        table.add_row("skipped", Text(f"{skipped.checkpoint}: {skipped.reason}"))
    chosen = f"step {result.chosen}" if result.chosen else "the base"
    table.add_row("model", Text(f"{chosen}, {result.model}"))
    last = result.steps[-1]
    scores = result.steps[result.chosen - 1].current if result.chosen else last.base
    for name, one in (
        ("its score", scores),
        ("base", last.base),
        ("last checkpoint", last.merged[-1].scores),
        ("uniform average", result.average),
    ):
        table.add_row(name, "  ".join(_scores("", one)) or "not evaluated")
    return table


def _scores(name: str, scores: Scores) -> list[str]:
    found = "  ".join(f"{which} {score:.4f}" for which, score in scores.items())
    return [f"{name} {found}".strip()] if found else []
