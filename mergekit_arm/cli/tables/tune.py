"""What ``mergekit-arm tune`` prints: the space, a line a trial, the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mergekit_arm.tuning.forecast import TuneForecast
from mergekit_arm.tuning.plan import TunePlan
from mergekit_arm.tuning.report.card import Row
from mergekit_arm.tuning.results import TuneResult
from mergekit_arm.tuning.space import Value
from mergekit_arm.tuning.trials import TrialRecord
from mergekit_arm.units import duration_text, size_text


def space_report(plan: TunePlan, forecast: TuneForecast) -> Iterator[RenderableType]:
    """Yield what a dry run shows."""
    settings = plan.settings
    table = Table(title=f"{plan.quest.budget} trials, {settings.sampler}, seed {settings.seed}")
    for column in ("method", "unknown", "domain", "tried first"):
        table.add_column(column)
    for row in _unknowns(plan):
        table.add_row(*(Text("" if one is None else str(one)) for one in row))
    yield table
    for quest in plan.quests[:-1]:
        points = [point["weight"] for _, point in quest.first]
        yield Text(f"baseline task arithmetic at {', '.join(map(str, points))}")
    yield Text(f"data     {forecast.tokens:,} scored tokens for every model")
    left = forecast.models - forecast.done
    if forecast.seconds is None:
        yield Text("time     known once a trial is done: run the same dry run again then")
    else:
        how = "by the trials done" if forecast.by_trials else "and the merges, by a few sequences"
        total = duration_text(forecast.seconds * left)
        yield Text(f"time     about {total} for {left} models {how}")
    if forecast.disk is not None:
        needed, free = size_text(forecast.disk), size_text(forecast.disk_free)
        yield Text(f"disk     about {needed}, {free} free")
    for note in plan.notes:
        yield Text(f"note: {note}", style="yellow")
    yield Text("nothing is wrong", style="green")


def space_fields(plan: TunePlan, forecast: TuneForecast) -> dict[str, Any]:
    """Return what a dry run shows, as JSON has it."""
    settings = plan.settings
    names = ("method", "unknown", "domain", "first")
    return {
        "trials": plan.quest.budget,
        "sampler": settings.sampler,
        "seed": settings.seed,
        "unknowns": [dict(zip(names, row, strict=True)) for row in _unknowns(plan)],
        "baseline": [p["weight"] for quest in plan.quests[:-1] for _, p in quest.first],
        "forecast": forecast,
        "notes": plan.notes,
    }


def _unknowns(plan: TunePlan) -> Iterator[tuple[str, str | None, str | None, Value | None]]:
    """Yield method, name, domain and first value of every unknown; a method may have none."""
    first = dict(reversed(plan.quest.first))
    for method, unknowns in plan.quest.candidates.methods.items():
        if not unknowns:
            yield method, None, None, None
        for name, domain in unknowns.items():
            yield method, name, str(domain), first.get(method, {}).get(name)


def trial_line(trial: TrialRecord, best: TrialRecord | None, done: int, budget: int) -> str:
    """Return one line about a trial that has ended."""
    name = "baseline" if trial.study == "baseline" else "trial"
    parts = [f"{done}/{budget}", f"{name} {trial.number}", trial.describe()]
    if trial.reason is not None:
        parts.append(f"failed: {trial.reason}")
    elif trial.gain is not None:
        parts.append(f"gain {trial.gain:+.4f}")
        parts.append("given up" if trial.outcome == "pruned" else _scores(trial))
    if best is not None and best.gain is not None:
        parts.append(f"best {best.gain:+.4f}")
    if trial.seconds:
        parts.append(f"{trial.seconds['all']:.1f} s")
    return "  ".join(parts)


def tune_summary(result: TuneResult) -> Iterator[RenderableType]:
    """Yield what ends a search."""
    yield _table("Evaluation, on which the numbers were searched", result.evaluation)
    if result.test:
        yield _table("Test, on which nothing was searched", result.test)
    if result.survives is not None:
        yield Text(f"{result.survives:.0%} of the gain survives on the test sets")
    if result.front:
        yield Text(f"front: {len(result.front)} trials, hypervolume {result.hypervolume:.4f}")
        for one in result.front:
            gains = "  ".join(f"{name} {gain:+.4f}" for name, gain in one.gains.items())
            yield Text(f"  trial {one.number}  {one.describe()}  {gains}")
    yield Text(f"best: trial {result.best.number}, {result.best.describe()}")
    yield Text(f"{result.out / 'best.yml'}{f' and {result.model}' if result.model else ''}")


def _scores(trial: TrialRecord) -> str:
    return "  ".join(f"{name} {score:.4f}" for name, score in trial.scores.items())


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title)
    names = list(rows[0][2])
    for column in ("", "gain", *names):
        table.add_column(column, justify="left" if column == "" else "right")
    for label, gain, scores in rows:
        shown = "" if gain is None else f"{gain:+.4f}"
        table.add_row(Text(label), shown, *(f"{scores[name]:.4f}" for name in names))
    return table
