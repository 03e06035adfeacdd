"""One trial after the other: merge, score share by share, and give up what is clearly worse."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import click

from mergekit_arm.errors import Failure
from mergekit_arm.files import no_room, scratch_at
from mergekit_arm.judging.judge import Scores
from mergekit_arm.tuning.candidates import document_of
from mergekit_arm.tuning.measuring import Told
from mergekit_arm.tuning.merging import Workshop
from mergekit_arm.tuning.objective import Yardstick, weighted_mean
from mergekit_arm.tuning.plan import Quest, TunePlan
from mergekit_arm.tuning.scoring import SHARES, ShareScorer
from mergekit_arm.tuning.search import Search, Taken

FAILURES = 3
"""Trials in a row that may fail before the search is given up."""


@dataclass
class Trying:
    """Takes trials of a study and works on them until the budget or the time is used."""

    plan: TunePlan
    shop: Workshop
    measures: list[Yardstick]
    """After each share of the data; the last is over all of it."""
    tell: Told
    on_trial: Callable[[Quest, int], None]
    """Called with the number of every trial that has ended."""
    deadline: float = math.inf
    """By ``time.monotonic``."""
    _failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._scorer = ShareScorer(self.plan.judge)

    def work(self, quest: Quest, search: Search) -> None:
        """Work on trials of one study.

        Raises:
            Failure: several trials in a row failed.
        """
        while time.monotonic() < self.deadline:
            taken = search.take(quest.budget)
            if taken is None:
                return
            try:
                reason = self._try(quest, search, taken)
            except BaseException:
                search.put_back(taken)
                raise
            self._failed = [*self._failed, reason] if reason else []
            self.on_trial(quest, taken.number)
            if len(self._failed) >= FAILURES:
                raise Failure(
                    f"{FAILURES} trials in a row failed, the last because: {self._failed[-1]}"
                )

    def _try(self, quest: Quest, search: Search, taken: Taken) -> str | None:
        """Work on a trial to its end, and return why it failed; None where it did not."""
        begun = time.perf_counter()
        document = document_of(quest.space, (taken.method, dict(taken.values)))
        judge = self.plan.judge
        try:
            model = self.shop.model(document, on_disk=judge.has_commands)
            merged = time.perf_counter()
            seconds = {"merge": merged - begun}
            scores: Scores = {}
            if model is not None:
                name = f"{quest.name} {taken.number}"
                shares = self._scorer.losses(
                    model, lambda done, total: self.tell(name, done, total)
                )
                for share, scores in enumerate(shares):
                    if not all(map(math.isfinite, scores.values())):
                        return self._fail(search, taken, f"a loss is not finite: {scores}")
                    if share + 1 < SHARES and self._gives_up(search, taken, scores, share):
                        facts = self._facts(scores, seconds, begun, merged, share)
                        search.prune(taken, facts)
                        return None
            if judge.has_commands:
                if model is not None:
                    del model
                    self.shop.close()
                scores = self._with_metrics(scores)
        except click.ClickException as error:
            if no_room(error):  # of which the trial is not the cause: it is put back
                raise Failure(f"{error.message}; with room, the same command goes on") from error
            return self._fail(search, taken, error.message)
        facts = self._facts(scores, seconds, begun, merged, -1)
        gains: Scores = facts["gains"]
        values = list(gains.values()) if self.plan.pareto else [facts["gain"]]
        search.tell(taken, values, facts)
        return None

    def _gives_up(self, search: Search, taken: Taken, scores: Scores, share: int) -> bool:
        if not self.plan.prunes or search.study.study_name != "tune":
            return False
        gains = self.measures[share].gains(scores)
        taken.trial.report(weighted_mean(gains, self.plan.judge.sets), share)
        return bool(taken.trial.should_prune())

    def _with_metrics(self, scores: Scores) -> Scores:
        folder = self.shop.folder
        with scratch_at(folder.with_name(f"{folder.name}.scratch")) as scratch:
            found = {**scores, **self.plan.judge.metrics(str(folder), scratch)}
        return {name: found[name] for name in self.plan.judge.sets}

    def _facts(
        self, scores: Scores, seconds: dict[str, float], begun: float, merged: float, share: int
    ) -> dict[str, Any]:
        now = time.perf_counter()
        spent = {**seconds, "score": now - merged, "all": now - begun}
        gains = self.measures[share].gains(scores)
        return {
            "scores": scores,
            "gains": gains,
            "gain": weighted_mean(gains, self.plan.judge.sets),
            "seconds": {name: round(value, 4) for name, value in spent.items()},
        }

    def _fail(self, search: Search, taken: Taken, reason: str) -> str:
        search.fail(taken, reason)
        return reason
