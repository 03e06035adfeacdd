"""The page on a search: its trials, and what each of the searched numbers did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mergekit_arm.errors import InputError
from mergekit_arm.outputs import read_saved
from mergekit_arm.reporting.drawings import (
    BLUE,
    GREY,
    ORANGE,
    RED,
    Curve,
    Drawing,
    curves,
    panels,
)
from mergekit_arm.reporting.page import Grid, Page
from mergekit_arm.tuning.layout import BEST, STATE_FILE, TRIALS
from mergekit_arm.tuning.space import Value
from mergekit_arm.tuning.state import TuneState
from mergekit_arm.tuning.trials import TrialRecord, best_of, completed, front_of, short

_MOST = 12
"""Parameters that are drawn, and trials that are listed."""
_GAIN = "gain (0: base, 1: best input)"


def tune_page(out: Path) -> Page:
    """Return the page on the search in ``out``, finished or not.

    Raises:
        InputError: its files are damaged, or of another version.
    """
    state = read_saved(
        out / STATE_FILE,
        TuneState,
        other_version="report with the version that wrote it",
        damaged="run the search again",
    )
    found = _trials(out)
    whole = completed(found, "tune")
    notes = [] if whole else ["No trial has been scored yet."]
    drawings = []
    if whole:
        drawings = [_by_trial(found), *_by_parameter(whole), *_front(whole)]
    best = out / BEST
    text = best.read_text(encoding="utf-8") if best.is_file() else None
    return Page(
        title=f"A search of {sum(one.study == 'tune' for one in found)} trials: {out.name}",
        facts=list(_facts(out, state, found)),
        drawings=drawings,
        notes=notes,
        tables=list(_tables(state, found)),
        listings=[] if text is None else [("Configuration of the best trial", text)],
    )


def _by_trial(found: list[TrialRecord]) -> Drawing:
    trials = [one for one in found if one.study == "tune"]
    whole = completed(found, "tune")
    last = max(one.number for one in trials)
    lines = [
        Curve("base", [(0, 0.0), (last, 0.0)], GREY, "dot", "lines"),
        Curve("best input", [(0, 1.0), (last, 1.0)], ORANGE, "dash", "lines"),
    ]
    baseline = [one.gain for one in completed(found, "baseline") if one.gain is not None]
    if baseline:
        level = max(baseline)
        lines.append(
            Curve("task arithmetic", [(0, level), (last, level)], GREY, "dashdot", "lines")
        )
    pruned = [one for one in trials if one.outcome == "pruned" and one.gain is not None]
    for group, colour, name in ((pruned, GREY, "given up"), (whole, BLUE, "trial")):
        if group:
            lines.append(
                Curve(name, [(one.number, one.gain or 0.0) for one in group], colour,
                      mode="markers", texts=[_said(one) for one in group])
            )  # fmt: skip
    best: list[tuple[float, float]] = []
    for one in whole:
        best.append((one.number, max([one.gain or 0.0, *(gain for _, gain in best)])))
    lines.append(Curve("best so far", best, RED, mode="lines", shape="hv"))
    return curves(
        "trials", "Gain by trial",
        "The weighted mean of the gains on all evaluation sets: 0 is the base's, 1 that of the "
        "best input model on each set.",
        lines, "trial", _GAIN,
    )  # fmt: skip


def _by_parameter(whole: list[TrialRecord]) -> Iterator[Drawing]:
    names = list(dict.fromkeys(name for one in whole for name in one.values))
    each = {}
    if len({one.method for one in whole}) > 1:
        each["method"] = _cloud([(label, one) for one in whole for label in [one.method]])
    for name in names[:_MOST]:
        each[name] = _cloud([(one.values[name], one) for one in whole if name in one.values])
    if not each:
        return
    more = f" The first {_MOST} of {len(names)} parameters." if len(names) > _MOST else ""
    yield panels(
        "parameters", "Gain by parameter",
        "Every scored trial, over each number that was searched. A cloud without a slope says that "
        f"the number mattered little where it was tried.{more}",
        each, "gain",
    )  # fmt: skip


def _cloud(points: Sequence[tuple[Value, TrialRecord]]) -> Curve:
    numbers = all(
        isinstance(value, int | float) and not isinstance(value, bool) for value, _ in points
    )
    return Curve(
        "trials",
        [(value if numbers else str(value), one.gain or 0.0) for value, one in points],
        BLUE,
        mode="markers",
        texts=[_said(one) for _, one in points],
    )


def _front(whole: list[TrialRecord]) -> Iterator[Drawing]:
    sets = list(whole[0].gains)
    if len(sets) < 2:
        return
    first, second = sets[:2]
    lines = [Curve("base", [(0.0, 0.0)], ORANGE, mode="markers", symbol="square", texts=["base"])]
    for group, colour, name in ((whole, BLUE, "trial"), (front_of(whole), RED, "front")):
        points = [(one.gains[first], one.gains[second]) for one in group]
        texts = [_said(one) for one in group]
        lines.append(Curve(name, points, colour, mode="markers", texts=texts))
    yield curves(
        "front", f"Gains on {first} and {second}",
        "The trials of the front are those that no other exceeds on every evaluation set.",
        lines, f"gain on {first}", f"gain on {second}", whole=False,
    )  # fmt: skip


def _facts(out: Path, state: TuneState, found: list[TrialRecord]) -> Iterator[tuple[str, str]]:
    yield "directory", str(out)
    for study in ("tune", "baseline"):
        own = [one for one in found if one.study == study]
        outcomes = {
            o: sum(one.outcome == o for one in own) for o in ("complete", "pruned", "failed")
        }
        said = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items() if count)
        if own:
            yield "trials" if study == "tune" else "task arithmetic", said or "none finished"
    best = best_of(found, "tune", pareto=False)
    if best is not None:
        yield "largest gain", _said(best)
    for reference, scores in state.scores.items():
        yield f"scores of {reference}", _numbers(scores)


def _tables(state: TuneState, found: list[TrialRecord]) -> Iterator[Grid]:
    for study, title in (("tune", "Best trials"), ("baseline", "Best of tuned task arithmetic")):
        whole = sorted(completed(found, study), key=lambda one: -(one.gain or 0.0))[:_MOST]
        if whole:
            sets = list(whole[0].scores)
            yield Grid(
                title,
                ("trial", "gain", *sets, "method", "values"),
                [
                    (
                        str(one.number),
                        f"{one.gain:+.3f}",
                        *(f"{one.scores[name]:.4f}" for name in sets),
                        one.method,
                        ", ".join(f"{name} {short(v)}" for name, v in one.values.items()),
                    )
                    for one in whole
                ],
            )
    failed = [one for one in found if one.outcome == "failed"]
    if failed:
        yield Grid(
            "Failed trials",
            ("trial", "study", "why"),
            [(str(one.number), one.study, str(one.reason)) for one in failed[:_MOST]],
        )


def _said(one: TrialRecord) -> str:
    gain = "" if one.gain is None else f", gain {one.gain:+.3f}"
    return f"trial {one.number}{gain}: {one.describe()}"


def _numbers(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {score:.4f}" for name, score in scores.items())


def _trials(out: Path) -> list[TrialRecord]:
    file = out / TRIALS
    if not file.is_file():
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return [TrialRecord.model_validate_json(line) for line in lines]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} is damaged ({type(error).__name__}); `mergekit-arm tune` on the same search "
            "writes it again"
        ) from error
