"""One process's part in a search: prepare, try, wait for the others, finish."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock
from mergekit.options import MergeOptions

from mergekit_arm.files import remove, unfinished, write_text
from mergekit_arm.merging.adapters import merge_adapter
from mergekit_arm.merging.options import LORA_CACHE
from mergekit_arm.outputs import remove_orphans
from mergekit_arm.tuning.layout import BEST, CARD, MODEL, PLOT, PREPARING, STATE_FILE, TRIALS, WORK
from mergekit_arm.tuning.measuring import Told, measure_references
from mergekit_arm.tuning.merging import Workshop
from mergekit_arm.tuning.objective import Yardstick
from mergekit_arm.tuning.plan import Quest, TunePlan
from mergekit_arm.tuning.report.files import best_text, trials_text
from mergekit_arm.tuning.report.plot import draw_tuning, importances
from mergekit_arm.tuning.results import Finish, TuneResult, document_of_trial
from mergekit_arm.tuning.search import Search
from mergekit_arm.tuning.state import open_tune_state
from mergekit_arm.tuning.trials import TrialRecord, best_of, records
from mergekit_arm.tuning.trying import Trying

_WRITTEN = (BEST, TRIALS, PLOT, STATE_FILE, CARD, MODEL)
_DRAW_EVERY = 30.0  # seconds

OnTrial = Callable[[TrialRecord, TrialRecord | None, int, int], None]
"""Called with a trial that has ended, and of its study: the best so far, how many trials have
ended, and how many there will be."""


@dataclass
class Run:
    """A search in this process; others may work on the same one."""

    out: Path
    plan: TunePlan
    merge: MergeOptions
    say: Callable[[str], None]
    tell: Told
    on_trial: OnTrial
    searches: dict[str, Search] = field(default_factory=dict)
    drawn: float = -math.inf

    def complete(self, *, with_model: bool) -> TuneResult:
        """Do what is left of the search, and make its results."""
        timeout = self.plan.settings.timeout
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        work = self.out / f"{WORK}.{os.getpid()}"
        alone = FileLock(self.out / PREPARING)
        with alone:
            measures = self._prepare(work)
        shop = Workshop(self.plan.judge, self.merge, work)
        try:
            trying = Trying(self.plan, shop, measures, self.tell, self._ended, deadline)
            for quest in self.plan.quests:
                trying.work(quest, self.searches[quest.name])
        finally:
            shop.close()
            remove(work)
        for search in self.searches.values():
            search.wait()
        with alone:
            state = open_tune_state(self.out, self.plan.fingerprint)
            found = self._records()
            finish = Finish(self.out, self.plan, self.merge, state, work, self.say, self.tell)
            result = finish.complete(found, with_model=with_model)
            self._write(found)
            self._draw(found)
            remove(self.out / LORA_CACHE)
        return result

    def _prepare(self, work: Path) -> list[Yardstick]:
        """Score what trials are measured against, and open the studies."""
        remove_orphans([*self.out.glob(f"{WORK}.*"), *unfinished(self.out, _WRITTEN)])
        state = open_tune_state(self.out, self.plan.fingerprint)
        state.save(self.out)
        for reference in self.plan.references:
            merge_adapter(reference, self.merge)
        scratch = work.with_name(f"{work.name}.scratch")
        measures = measure_references(self.plan, self.merge, self.out, state, scratch, self.tell)
        for quest in self.plan.quests:
            self.searches[quest.name] = self._open(quest)
        return measures

    def _open(self, quest: Quest) -> Search:
        settings = self.plan.settings
        search = Search(
            self.out,
            quest.name,
            quest.candidates,
            objectives=len(self.plan.judge.sets) if self.plan.pareto else 1,
            sampler=settings.sampler if quest is self.plan.quest else "random",
            seed=settings.seed,
            pruning=self.plan.prunes,
        )
        search.enqueue(quest.first)
        return search

    def _records(self) -> list[TrialRecord]:
        return [one for search in self.searches.values() for one in records(search)]

    def _ended(self, quest: Quest, number: int) -> None:
        found = self._records()
        last = next(one for one in found if (one.study, one.number) == (quest.name, number))
        best = best_of(found, quest.name, pareto=self.plan.pareto)
        mine = [one for one in found if one.study == quest.name]
        ended = sum(one.outcome != "running" for one in mine)
        self.on_trial(last, best, ended, quest.budget)
        self._write(found)
        if time.monotonic() - self.drawn > _DRAW_EVERY:
            self._draw(found)

    def _write(self, found: list[TrialRecord]) -> None:
        write_text(self.out / TRIALS, trials_text(found))
        best = best_of(found, "tune", pareto=self.plan.pareto)
        if best is not None:
            document = document_of_trial(self.plan, best)
            write_text(self.out / BEST, best_text(document, best, self.merge))

    def _draw(self, found: list[TrialRecord]) -> None:
        draw_tuning(found, importances(self.searches["tune"].study), self.out / PLOT)
        self.drawn = time.monotonic()
