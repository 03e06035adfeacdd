"""The end of a search: the best merge written out, and tested on data it was not searched on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit.options import MergeOptions

from mergekit_arm.errors import Failure
from mergekit_arm.files import remove, write_text
from mergekit_arm.judging.judge import Judge, Scores
from mergekit_arm.judging.sets import HeldOutSet
from mergekit_arm.merging.card import without_paths
from mergekit_arm.merging.documents import to_yaml
from mergekit_arm.merging.merge import merge
from mergekit_arm.tuning.candidates import document_of
from mergekit_arm.tuning.layout import CARD, MODEL
from mergekit_arm.tuning.measuring import Told, score_reference
from mergekit_arm.tuning.objective import hypervolume, weighted_mean, yardstick
from mergekit_arm.tuning.plan import TunePlan
from mergekit_arm.tuning.report.card import Row, tune_card
from mergekit_arm.tuning.report.files import best_text
from mergekit_arm.tuning.state import TuneState
from mergekit_arm.tuning.trials import TrialRecord, best_of, completed, front_of


@dataclass(frozen=True)
class TuneResult:
    """A search that has come to its end."""

    out: Path
    best: TrialRecord
    document: dict[str, Any]
    """Of the best trial: an ordinary mergekit configuration."""
    trials: list[TrialRecord]
    evaluation: list[Row]
    """Base, inputs, baseline and best, on the sets that were searched on."""
    test: list[Row]
    """The same on the test sets; empty where there are none."""
    model: Path | None
    front: list[TrialRecord] = field(default_factory=list)
    """Of several objectives."""
    hypervolume: float | None = None

    @property
    def survives(self) -> float | None:
        """The test's gain as a share of the evaluation's; None without test or without a gain."""
        gain, tested = self.evaluation[-1][1], self.test[-1][1] if self.test else None
        return tested / gain if tested is not None and gain is not None and gain > 0 else None


def document_of_trial(plan: TunePlan, trial: TrialRecord) -> dict[str, Any]:
    """Return the configuration that a trial merged."""
    quest = next(one for one in plan.quests if one.name == trial.study)
    return document_of(quest.space, (trial.method, trial.values))


@dataclass
class Finish:
    """Makes the results of the trials that there are; what is made already stays."""

    out: Path
    plan: TunePlan
    merge: MergeOptions
    state: TuneState
    work: Path
    """For one merged model, beside what commands leave."""
    say: Callable[[str], None]
    tell: Told

    def complete(self, found: list[TrialRecord], *, with_model: bool) -> TuneResult:
        """Make the model, test it, and return all that is known.

        Raises:
            Failure: no trial has a result.
        """
        plan = self.plan
        best = best_of(found, "tune", pareto=plan.pareto)
        if best is None:
            reasons = [one.reason for one in found if one.reason]
            why = reasons[-1] if reasons else "the time was over before the first had ended"
            raise Failure(f"no trial has a result: {why}")
        baseline = best_of(found, "baseline", pareto=plan.pareto)
        both = [one for one in (baseline, best) if one is not None]
        if baseline is not None and (baseline.gain or 0.0) > (best.gain or 0.0):
            self.say(f"the baseline {_label(baseline)} was better than the best trial")
        if best.gain is not None and best.gain <= 0:
            self.say("no trial is better than the base: the best of them is written all the same")
        document = document_of_trial(plan, best)
        scores = {name: self.state.scores[name] for name in plan.references}
        evaluation = _rows(plan, plan.judge, scores)
        evaluation += [(_label(one), one.gain, one.scores) for one in both]
        model = self._make_model(document) if with_model else None
        test = self._test(plan.test, both) if plan.test is not None else []
        if model is not None:
            count = len(completed(found, "tune"))
            text = best_text(without_paths(document), best, self.merge)
            card = tune_card(plan, best, text, count, evaluation, test)
            write_text(model / CARD, card, staging=self.out)
        front = front_of(completed(found, "tune")) if plan.pareto else []
        volume = hypervolume([list(one.gains.values()) for one in front]) if front else None
        return TuneResult(self.out, best, document, found, evaluation, test, model, front, volume)

    def _make_model(self, document: dict[str, Any]) -> Path:
        model, text = self.out / MODEL, to_yaml(document)
        if not (model.is_dir() and self.state.model == text):
            merge(document, text, model, self.merge)
            self.state.model = text
            self.state.save(self.out)
        return model

    def _test(self, judge: Judge, trials: list[TrialRecord]) -> list[Row]:
        """Score base, inputs, baseline and best on data that the search has not seen."""
        asked = _judged_by(judge)
        scores: dict[str, Scores] = {}
        for reference in self.plan.references:
            scores[reference] = self._test_one(judge, f"{asked} {reference}", reference, None)
        for trial in trials:
            document = document_of_trial(self.plan, trial)
            key = f"{asked} {to_yaml(document)}"
            scores[_label(trial)] = self._test_one(judge, key, _label(trial), document)
        return _rows(self.plan, judge, scores)

    def _test_one(
        self, judge: Judge, key: str, label: str, document: dict[str, Any] | None
    ) -> Scores:
        if key not in self.state.test:
            reference = label
            if document is not None:
                merge(document, to_yaml(document), self.work, self.merge)
                reference = str(self.work)
            scratch = self.work.with_name(f"{self.work.name}.scratch")

            def on_tokens(done: int, total: int) -> None:
                self.tell(f"test: {label}", done, total)

            shares = score_reference(judge, reference, self.merge, scratch, on_tokens)
            self.state.test[key] = shares[-1]
            remove(self.work)
            self.state.save(self.out)
        return self.state.test[key]


def _rows(plan: TunePlan, judge: Judge, scores: dict[str, Scores]) -> list[Row]:
    base = scores[plan.base] if plan.base else None
    measure = yardstick(judge.sets, base, [scores[name] for name in plan.inputs])
    return [
        (label, weighted_mean(measure.gains(found), judge.sets), found)
        for label, found in scores.items()
    ]


def _judged_by(judge: Judge) -> str:
    return json.dumps(
        {
            name: judge.heldout(name).digest if isinstance(one, HeldOutSet) else one.metric_command
            for name, one in judge.sets.items()
        }
    )


def _label(one: TrialRecord) -> str:
    if one.study == "baseline":
        return f"task arithmetic {one.values['weight']}"
    return f"best: trial {one.number}"
