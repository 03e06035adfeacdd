"""What ``mergekit-arm stream`` prints: the plan, a line a step, the end."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mergekit_arm.streaming.forecast import Forecast
from mergekit_arm.streaming.judge import Score
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
        for step in plan.steps():
            done = " (done)" if step.step <= forecast.done else ""
            rate = "" if step.rate is None else f"{step.rate:.4g}"
            measures = "yes" if step.measures else ""
            table.add_row(f"{step.step}{done}", Text(step.checkpoint.name), rate, measures)
        yield table
    elif plan is not None:
        yield Text(f"Follows {plan.config.checkpoints}; the number of steps is not known yet.")
    if needs is not None:
        if forecast.seconds is not None:
            yield Text(f"time     about {duration_text(forecast.seconds)} more, by the steps done")
        else:
            yield Text("time     known once a step is done: run the same dry run again then")
        yield Text(f"disk     about {size_text(needs.disk)}, {size_text(needs.disk_free)} free")
        yield Text(f"memory   about {size_text(needs.memory)}, {size_text(needs.memory_free)} free")
    for note in plan.notes if plan is not None else []:
        yield Text(f"note: {note}", style="yellow")
    for problem in forecast.problems:
        yield Text(f"wrong: {problem}", style="red")
    if not forecast.problems:
        yield Text("nothing is wrong", style="green")


def step_line(record: StepRecord) -> str:
    """Return one line about a committed step."""
    parts = [f"step {record.step}", record.checkpoint]
    if record.learning_rate is not None:
        parts.append(f"η {record.learning_rate:.3g}")
    parts.append(f"‖update‖ {record.update_norm:.3g}")
    if record.rotation_degrees:
        parts.append(f"turned {record.rotation_degrees['mean']:.1f}°")
    parts += _scores("merged", record.current) + _scores("checkpoint", record.latest_checkpoint)
    if not record.accepted:
        parts.append("not merged: worse at every rate")
    parts.append(f"{sum(record.seconds.values()):.1f} s")
    return "  ".join(parts)


def stream_summary(result: StreamResult) -> Table:
    """Return the table that ends a stream."""
    table = Table(title="The stream has ended", show_header=False)
    table.add_row("steps", f"{len(result.steps)}: {result.stopped}")
    chosen = f"step {result.chosen}" if result.chosen else "the base"
    table.add_row("model", Text(f"{chosen}, {result.model}"))
    if result.steps:
        last = result.steps[-1]
        score = result.steps[result.chosen - 1].current if result.chosen else last.base
        table.add_row("its score", "  ".join(_scores("", score)) or "not evaluated")
        table.add_row("base", "  ".join(_scores("", last.base)) or "not evaluated")
        table.add_row(
            "last checkpoint", "  ".join(_scores("", last.latest_checkpoint)) or "not evaluated"
        )
    return table


def _scores(name: str, score: Score) -> list[str]:
    found = []
    prefix = f"{name} " if name else ""
    if score.loss is not None:
        found.append(f"{prefix}loss {score.loss:.4f}")
    if score.metric is not None:
        found.append(f"{prefix}metric {score.metric:g}")
    return found
