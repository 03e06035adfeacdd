"""One step: measure, merge, judge, merge with other rates where asked to, and compare.

Nothing here commits: what a step leaves in its directory counts once the stream has saved the
record that :func:`take_step` returns.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit.options import MergeOptions

from mergekit_arm.errors import Failure
from mergekit_arm.files import remove, size_of, write_text
from mergekit_arm.judging.judge import Scores
from mergekit_arm.merging.adapters import merge_adapter
from mergekit_arm.merging.documents import by_hand, to_yaml
from mergekit_arm.merging.merge import forgetting, merge
from mergekit_arm.models.contents import describe
from mergekit_arm.streaming.layout import CHECKPOINT_STATISTICS, MODEL, PROVENANCE, STEP_CONFIG
from mergekit_arm.streaming.plan.document import step_document
from mergekit_arm.streaming.plan.plan import PlannedStep, one_or_all
from mergekit_arm.streaming.rates import Rate, rate_text, scaled
from mergekit_arm.streaming.state import Attempt, MergedCheckpoint, Move, StepRecord
from mergekit_arm.streaming.step.measuring import StepStatistics, measure_step, provenance
from mergekit_arm.streaming.step.movement import measure_move
from mergekit_arm.streaming.step.workplace import Workplace
from mergekit_arm.streaming.training.checkpoints import RunCheckpoint, problem_of

HALVINGS = 4
"""How often ``backtrack`` halves a step's learning rate before it gives the checkpoint up."""

_DEFAULT_SEED = 42


@dataclass
class _Clock:
    """Seconds of a step by what they went into."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begun
            self.seconds[part] = round(self.seconds.get(part, 0.0) + spent, 3)


@dataclass
class _Step:
    """A step that is being made."""

    place: Workplace
    planned: PlannedStep
    current: str
    """Reference of the model that it starts from."""
    measured: StepStatistics
    options: MergeOptions
    clock: _Clock

    @property
    def merged(self) -> str:
        return str(self.place.folder(self.planned.step) / MODEL)

    def document(self, rates: list[Rate] | None) -> dict[str, Any]:
        return step_document(
            self.place.plan.config,
            self.place.plan.method,
            current=self.current,
            checkpoints=[one.reference for one in self.planned.checkpoints],
            rates=rates,
            statistics=self.measured.shared,
            own_statistics=self.measured.own,
            chat_template=self.place.state.chat_template,
        )

    def forgetting(self) -> AbstractContextManager[None]:
        """Forget afterwards what mergekit has opened."""
        references = [one.reference for one in self.planned.checkpoints]
        statistics = [*self.measured.shared.values(), *self.measured.own]
        return forgetting([self.current, self.merged, *references], statistics)

    def merge(self, rates: list[Rate] | None) -> None:
        """Merge into the step's directory, unless this very merge lies there already."""
        folder = self.place.folder(self.planned.step)
        document = self.document(rates)
        text = to_yaml(document, self._comment(document))
        config, model = folder / STEP_CONFIG, folder / MODEL
        if model.is_dir():
            if config.is_file() and config.read_text(encoding="utf-8") == text:
                return
            remove(model)
        write_text(config, text)
        with self.forgetting(), self.clock.time("merge"):
            merge(document, text, model, self.options)

    def _comment(self, document: dict[str, Any]) -> list[str]:
        folder = self.place.folder(self.planned.step)
        lines = [
            f"Step {self.planned.step} of a stream: {self.planned.name} into the model so far.",
            f"By hand: {by_hand(folder / STEP_CONFIG, self.options, document)}",
        ]
        if self.place.keep != "all":
            lines.append(
                "Its inputs' weights and statistics are kept with --keep all; else make them "
                "again, step by step."
            )
        return lines

    def judge(self, rates: list[Rate] | None) -> Attempt:
        """Merge with ``rates`` and score the result."""
        self.merge(rates)
        with self.clock.time("evaluate"):
            scores = self.place.score(self.merged)
        return Attempt(rates=rates, scores=scores, bytes=size_of(Path(self.merged)))

    def measure(self, rates: list[Rate] | None) -> Move:
        """Return how far the model went by the merge that was made with ``rates``.

        Raises:
            Failure: a weight of the merged model is no number.
        """
        move, problem = Move(), None
        if self.place.plan.config.compare.angles:
            with self.forgetting(), self.clock.time("measure"):
                move = measure_move(self.document(rates), self.merged, self.options)
            if not math.isfinite(move.update_norm or 0.0):
                problem = f"{self.merged}: a weight is no finite number"
        else:
            problem = problem_of(self.merged)
        if problem:
            raise Failure(f"{problem}; try a lower learning_rate")
        return move


def take_step(place: Workplace, planned: PlannedStep) -> StepRecord:
    """Do one step and return its record; nothing of it is committed yet.

    Whatever of it a killed run had finished (statistics, judged merges) is used again.
    Leaves the step's weights in its directory where the step was accepted.
    """
    state, folder, clock = place.state, place.folder(planned.step), _Clock()
    current = place.needed(state.before(planned.step))
    folder.mkdir(parents=True, exist_ok=True)
    contents = [describe(one.reference).fingerprint for one in planned.checkpoints]
    _forget_another(place, planned, contents)
    with clock.time("calibrate"):
        measured = measure_step(place, planned)
    with clock.time("evaluate"):
        described = zip(planned.checkpoints, contents, strict=True)
        merged = [_describe(place, one, content) for one, content in described]
    step = _Step(place, planned, current, measured, _options_of(place, planned.step), clock)
    chosen, move = _choose(step), Move()
    if chosen is not None:
        step.merge(chosen.rates)  # where another was tried after it
        move = step.measure(chosen.rates)
    else:
        remove(folder / MODEL)
    scores = chosen.scores if chosen else state.scores_of(state.current)
    rate = one_or_all((chosen or state.tried[-1]).rates)
    better = chosen is not None and place.better(scores, state.scores_of(state.best))
    record = StepRecord(
        step=planned.step,
        position=planned.position,
        passed=planned.passed,
        checkpoint=planned.name,
        merged=merged,
        learning_rate=rate if chosen or not planned.search else 0.0,
        planned=planned.planned,
        tried=state.tried,
        accepted=chosen is not None,
        statistics_from=measured.step,
        calibration_tokens=measured.tokens,
        **dict(move),
        current=scores,
        base=state.base or {},
        best_step=planned.step if better else state.best,
        seconds=clock.seconds,
        bytes=sum(one.bytes for one in state.tried),
    )
    if measured.step is not None:
        write_text(folder / PROVENANCE, provenance(measured))
    return record


def _forget_another(place: Workplace, planned: PlannedStep, contents: list[str]) -> None:
    """Forget what a killed run made for this step of other checkpoints, or for other rates."""
    state, folder = place.state, place.folder(planned.step)
    making = json.dumps([planned.step, contents, planned.planned])
    if state.making == making:
        return
    for made in (folder / MODEL, *folder.glob(f"{CHECKPOINT_STATISTICS}*")):
        remove(made)
    state.tried, state.making = [], making
    state.save(place.out)


def _choose(step: _Step) -> Attempt | None:
    """Merge and judge, and return the attempt that the step takes; None where all are worse.

    ``state.tried`` holds all that was judged, also by a run that was killed.
    """
    place, planned = step.place, step.planned
    state, evaluation = place.state, place.plan.config.evaluation
    start = state.scores_of(state.current)
    backtrack = evaluation is not None and evaluation.backtrack
    proposals: list[list[Rate] | None] = [planned.rates]
    if planned.search:
        proposals = [[rate] * len(planned.checkpoints) for rate in planned.search]
    elif backtrack:
        assert planned.rates is not None  # the plan refuses to backtrack without one
        proposals += [scaled(planned.rates, 0.5**n) for n in range(1, HALVINGS + 1)]
    best: Attempt | None = None  # a step of 0, which stays where the model is
    for number, rates in enumerate(proposals):
        if number == len(state.tried):
            state.tried.append(step.judge(rates))
            state.save(place.out)
        attempt = state.tried[number]
        if planned.search:
            if place.better(attempt.scores, best.scores if best else start):
                best = attempt
        elif not (backtrack and place.better(start, attempt.scores)):
            return attempt
        elif number < HALVINGS:
            place.say(
                f"step {planned.step}: worse at learning rate {rate_text(rates)}; again with "
                f"{rate_text(proposals[number + 1])}"
            )
    return best


def _options_of(place: Workplace, step: int) -> MergeOptions:
    # Methods with random masks would drop the same weights at every step with one seed.
    seed = place.merge.random_seed
    return place.merge.model_copy(
        update={
            "random_seed": (_DEFAULT_SEED if seed is None else seed) + step,
            # Calibration and evaluation need it, whatever the final model gets.
            "copy_tokenizer": place.plan.has_tokenizer,
            "safe_serialization": True,
        }
    )


def _describe(place: Workplace, one: RunCheckpoint, content: str) -> MergedCheckpoint:
    """Return a checkpoint's record; scored once, however often the stream passes over it."""
    merge_adapter(one.reference, place.merge)
    scores: Scores = {}
    if place.plan.config.compare.checkpoints:
        earlier = [known for record in place.state.steps for known in record.merged]
        same = [known for known in earlier if known.reference == one.reference and known.scores]
        scores = same[0].scores if same else place.score_aside(one.reference)
    return MergedCheckpoint(name=one.name, reference=one.reference, content=content, scores=scores)
