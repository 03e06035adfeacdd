"""The stream: one merge after another, each judged, each committed before the next begins.

What can be refused is refused first (``forecast``); then the loop takes a step, saves the state
and tidies up, until a reason to stop is found; ``ending`` makes ``OUT/model``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mergekit_arm.errors import Failure, InputError
from mergekit_arm.files import remove
from mergekit_arm.judging.judge import Progress, Scores
from mergekit_arm.models.references import plain_path
from mergekit_arm.outputs import alone
from mergekit_arm.streaming.config import StreamConfig
from mergekit_arm.streaming.ending import finish
from mergekit_arm.streaming.forecast import forecast_stream, seconds_left
from mergekit_arm.streaming.layout import INCOMING, LOCK_FILE, MODEL, left_behind
from mergekit_arm.streaming.options import StreamOptions
from mergekit_arm.streaming.plan.plan import PlannedStep
from mergekit_arm.streaming.plan.prefix import begun
from mergekit_arm.streaming.rescoring import score_again
from mergekit_arm.streaming.state import Skipped, StepRecord, read_state
from mergekit_arm.streaming.step.step import take_step
from mergekit_arm.streaming.step.workplace import Workplace
from mergekit_arm.streaming.training.checkpoints import problem_of, reached
from mergekit_arm.streaming.training.watch import Watch
from mergekit_arm.units import duration_text


@dataclass(frozen=True)
class StreamResult:
    """What a finished stream left."""

    out: Path
    model: Path
    chosen: int
    """The step that ``model`` is; 0 is the base."""
    stopped: str
    steps: list[StepRecord]
    skipped: list[Skipped]
    average: Scores
    """Of the merged checkpoints' uniform average; empty where it was not scored."""


def stream(
    config: StreamConfig | Mapping[str, Any] | str | Path,
    out: str | Path,
    options: StreamOptions | None = None,
    *,
    say: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    evaluating: Progress | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> StreamResult:
    """Merge a run's checkpoints one after another and leave the chosen model in ``out/model``.

    A stream that was interrupted goes on where it was, and gives the same bytes as one that
    was not. A finished one goes on with checkpoints that have come since; where there are none,
    it returns its result again and changes nothing. Holds one model at a time (calibration,
    evaluation), or what mergekit holds in a merge.

    Args:
        config: the stream's YAML file, its content, or the checked model of it.
        out: a new directory, or that of the same stream.
        options: mergekit's options and what to keep; defaults as on the command line.
        say: receives one-line notes for the user.
        progress: called during calibration with tokens done and tokens in all.
        evaluating: called during evaluation with what it is, tokens done and tokens in all.
        on_step: called with the record of every step once it is committed.

    Raises:
        InputError: something in ``config`` or what it names is wrong, or ``out`` holds
            another stream; found before the first forward pass wherever it can be.
        Failure: a merge or an evaluation that failed; run again to continue.
    """
    options = options or StreamOptions()
    say = say or (lambda note: None)
    place, known = Path(plain_path(out)), forecast_stream(config, out, options, reads_data=False)
    plan, state = known.plan, known.state
    if plan is None or known.problems:
        first, *others = known.problems
        more = f" (and {len(others)} more: --dry-run lists them)" if others else ""
        raise InputError(first + more)
    for note in plan.notes:
        say(note)
    if known.judge is not None:
        known.judge.progress = evaluating
        known.judge.say = say if options.merge.verbosity else None  # else it is in metric.log
    with alone(place / LOCK_FILE, f"{place}: another process runs this stream; wait for it"):
        for left in left_behind(place):  # before anything needs room, as `remove` does
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if read_state(place) != state:
            raise InputError(f"{place}: another process has just worked on it; run again")
        state = begun(plan, state, place, say)
        work = Workplace(place, plan, known.merge, options.keep, state, known.judge, say, progress)
        watch = None
        if options.watch is not None:
            run, base = Path(plain_path(str(plan.config.checkpoints))), plan.config.base_model
            watch = Watch(run, place / INCOMING, base, options.watch, say, last=state.last)
        with watch or nullcontext():
            return _Loop(work, watch, options, on_step or (lambda record: None)).complete()


@dataclass
class _Loop:
    """The loop over steps."""

    place: Workplace
    watch: Watch | None
    options: StreamOptions
    on_step: Callable[[StepRecord], None]

    def complete(self) -> StreamResult:
        """Do every step that is still to do, then the final model."""
        place, state = self.place, self.place.state
        # What was skipped at the very end may have become whole, and has its place there.
        last = max((one.position for one in state.steps), default=-1)
        state.skipped = [one for one in state.skipped if one.position < last]
        score_again(place)
        state.save(place.out)
        if state.chosen is None:  # what a finished stream kept was asked for
            place.prune()
        place.write_journal()
        reason = self._all_steps()
        if self.watch is not None:
            self.watch.stop()
        if not state.steps:
            whys = [f"{one.checkpoint}: {one.reason}" for one in state.skipped]
            raise Failure(f"{place.out}: no checkpoint was merged ({'; '.join(whys) or reason})")
        chosen = finish(place, reason)
        return StreamResult(
            out=place.out,
            model=place.out / MODEL,
            chosen=chosen,
            stopped=reason,
            steps=list(state.steps),
            skipped=list(state.skipped),
            average=state.average.scores if state.average else {},
        )

    def _all_steps(self) -> str:
        """Take steps until there is a reason to stop, and return it."""
        while True:
            planned = self._reason_to_stop() or self._next()
            if isinstance(planned, str):
                return planned
            problem = self._problem(planned)
            if problem is None:
                self._step(planned)
            else:
                self._skip(planned, problem)

    def _step(self, planned: PlannedStep) -> None:
        place, state = self.place, self.place.state
        self._begin(planned)
        try:
            record = take_step(place, planned)
        except (InputError, Failure, OSError, SafetensorError):
            problem = self._problem(planned)  # deleted while it was merged
            if problem is None:
                raise
            self._skip(planned, problem)
            return
        state.steps.append(record)
        state.tried = []
        state.chosen = state.stopped = None
        state.save(place.out)
        place.prune()
        place.write_journal()
        self.on_step(record)
        left = seconds_left(place.plan, state)
        if len(state.steps) == 1 and left is not None and left >= 60:
            # The first measures the model, which others may not.
            place.say(f"at most about {duration_text(left)} for the other steps, by the first")

    def _begin(self, planned: PlannedStep) -> None:
        """Score the base, for which a checkpoint's chat template may be needed."""
        place, state = self.place, self.place.state
        references = [one.reference for one in planned.checkpoints]
        if place.judge is not None:
            place.judge.add_reference(references[0])
        if state.base is None:
            state.chat_template = place.borrow_template(references)
            state.base = place.score(place.plan.config.base_model)
            state.data = place.judge.data() if place.judge is not None else {}
            state.save(place.out)

    def _problem(self, planned: PlannedStep) -> str | None:
        found = (problem_of(one.reference) for one in planned.checkpoints)
        return next(filter(None, found), None)

    def _skip(self, planned: PlannedStep, problem: str) -> None:
        """Leave out what cannot be merged, and say so.

        Raises:
            Failure: the user wants to know of it first.
        """
        place, state = self.place, self.place.state
        if self.options.strict:
            raise Failure(f"{planned.name} cannot be merged (--strict): {problem}")
        place.say(f"{planned.name} is skipped: {problem}")
        remove(place.folder(planned.step))
        state.tried = []
        state.skipped.append(
            Skipped(position=planned.position, checkpoint=planned.name, reason=problem)
        )
        state.save(place.out)
        place.write_journal()

    def _next(self) -> PlannedStep | str:
        """Return the next step, or why there is none."""
        plan, state = self.place.plan, self.place.state
        if self.watch is None:
            steps = plan.steps(state)
            return steps[0] if steps else "all checkpoints are merged"
        if plan.length is not None and state.position >= plan.length:
            return "the list of learning rates is used up"
        found = self.watch.next(reached(state))
        state.last = self.watch.last
        if isinstance(found, str):
            return found
        return plan.planned(len(state.steps) + 1, state.position, (found,))

    def _reason_to_stop(self) -> str | None:
        evaluation, state = self.place.plan.config.evaluation, self.place.state
        if self.options.finish:
            return "finished early (--finish)"
        since = len(state.steps) - state.best
        if evaluation is not None and evaluation.patience and since >= evaluation.patience:
            return f"no step was better for {since} steps (patience)"
        return None
