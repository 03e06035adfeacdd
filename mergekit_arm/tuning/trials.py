"""What became of every trial: a line of ``trials.jsonl`` each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict

from mergekit_arm.judging.judge import Scores
from mergekit_arm.tuning.objective import front
from mergekit_arm.tuning.search import Search, reason_of
from mergekit_arm.tuning.space import Value

Outcome = Literal["complete", "pruned", "failed", "running", "waiting"]
_OUTCOMES: dict[TrialState, Outcome] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


class TrialRecord(BaseModel):
    """One trial."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    study: str
    """``baseline`` or ``tune``."""
    number: int
    """From 0, within its study."""
    outcome: Outcome
    method: str
    values: dict[str, Value]
    gain: float | None = None
    """Weighted mean of the gains: 0 is the base, 1 the best input on every set."""
    gains: Scores = {}
    """By evaluation set."""
    scores: Scores = {}
    """By evaluation set: a loss in nats, or the command's number; so far, where pruned."""
    seconds: dict[str, float] = {}
    """Of the merge, of scoring, and of all together."""
    reason: str | None = None
    """Why it failed."""

    def describe(self) -> str:
        """Return the point in words."""
        values = ", ".join(f"{name} {short(value)}" for name, value in self.values.items())
        return f"{self.method}: {values}" if values else self.method


def short(value: Value) -> str:
    """Return a value in few digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def records(search: Search) -> list[TrialRecord]:
    """Return a study's trials, but for those that wait and those that were put back."""
    return [
        _record(search, trial) for trial in search.trials() if trial.state != TrialState.WAITING
    ]


def completed(found: Iterable[TrialRecord], study: str) -> list[TrialRecord]:
    """Return the trials of a study that were scored whole."""
    return [one for one in found if one.study == study and one.outcome == "complete"]


def best_of(found: Sequence[TrialRecord], study: str, *, pareto: bool) -> TrialRecord | None:
    """Return a study's best trial, the first of equals; None before the first.

    With several objectives, it is the one of the front with the largest weighted mean.
    """
    candidates = completed(found, study)
    if pareto:
        candidates = front_of(candidates)
    return max(candidates, key=_gain, default=None)


def front_of(found: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the trials that no other exceeds on every set."""
    return [found[i] for i in front([list(one.gains.values()) for one in found])]


def _gain(one: TrialRecord) -> float:
    assert one.gain is not None  # it is complete
    return one.gain


def _record(search: Search, trial: FrozenTrial) -> TrialRecord:
    method, values = search.point_of(trial)
    facts = trial.user_attrs
    return TrialRecord(
        study=search.study.study_name,
        number=trial.number,
        outcome=_OUTCOMES[trial.state],
        method=method,
        values=values,
        gain=facts.get("gain"),
        gains=facts.get("gains", {}),
        scores=facts.get("scores", {}),
        seconds=facts.get("seconds", {}),
        reason=reason_of(trial),
    )
