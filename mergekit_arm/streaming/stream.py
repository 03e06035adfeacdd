"""The stream: one merge after another, each judged, each committed before the next begins.

What can be refused is refused first (``plan``, ``data_checks``); then the loop takes a step, saves
the state, tidies up and draws, until a reason to stop is found; at last it makes ``OUT/model``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mergekit_arm.errors import Failure, InputError
from mergekit_arm.files import remove, write_text
from mergekit_arm.streaming.config import StreamConfig, load_config
from mergekit_arm.streaming.data_checks import (
    data_problems,
    disk_problems,
    keep_problems,
    make_judge,
)
from mergekit_arm.streaming.forecast import seconds_left
from mergekit_arm.streaming.layout import (
    CARD,
    INCOMING,
    LOCK_FILE,
    LORA_CACHE,
    MODEL,
    PLOT,
    unfinished,
)
from mergekit_arm.streaming.options import StreamOptions, WatchOptions, complete_options
from mergekit_arm.streaming.plan.document import cast_document, to_yaml
from mergekit_arm.streaming.plan.plan import PlannedStep, StreamPlan, make_plan
from mergekit_arm.streaming.references import plain_path
from mergekit_arm.streaming.report.card import stream_card
from mergekit_arm.streaming.report.plot import draw_stream
from mergekit_arm.streaming.state import State, StepRecord, open_state, read_state
from mergekit_arm.streaming.step.merge import forgetting, merge, merge_adapter
from mergekit_arm.streaming.step.step import take_step
from mergekit_arm.streaming.step.workplace import Workplace
from mergekit_arm.streaming.training.checkpoints import RunCheckpoint
from mergekit_arm.streaming.training.watch import Watch
from mergekit_arm.units import duration_text

_DRAW_EVERY = 30.0  # seconds: drawing must not cost more than a small model's steps


@dataclass(frozen=True)
class StreamResult:
    """What a finished stream left."""

    out: Path
    model: Path
    chosen: int
    """The step that ``model`` is; 0 is the base."""
    stopped: str
    steps: list[StepRecord]


def stream(
    config: StreamConfig | Mapping[str, Any] | str | Path,
    out: str | Path,
    options: StreamOptions | None = None,
    *,
    say: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> StreamResult:
    """Merge a run's checkpoints one after another and leave the chosen model in ``out/model``.

    A stream that was interrupted goes on where it was, and gives the same bytes as one that
    was not; a finished one returns its result again and changes nothing. Holds one model at a
    time (calibration, evaluation), or what mergekit holds in a merge.

    Args:
        config: the stream's YAML file, its content, or the checked model of it.
        out: a new directory, or that of the same stream.
        options: mergekit's options and what to keep; defaults as on the command line.
        say: receives one-line notes for the user.
        progress: called during calibration with tokens done and tokens in all.
        on_step: called with the record of every step once it is committed.

    Raises:
        InputError: something in ``config`` or what it names is wrong, or ``out`` holds
            another stream; found before the first forward pass wherever it can be.
        Failure: a merge or an evaluation that failed; run again to continue.
    """
    options = options or StreamOptions()
    say = say or (lambda note: None)
    place = Path(plain_path(out))
    merge_options = complete_options(options.merge, place)
    plan, problems = make_plan(load_config(config), merge_options, options.watch)
    problems += keep_problems(plan, options.keep)
    _refuse(problems)
    assert plan is not None  # without a plan there are problems
    for note in plan.notes:
        say(note)
    read_state(place)  # refuses a directory of something else before anything is put into it
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{place} cannot be made: {error.strerror}; give another OUT") from error
    with _locked(place):
        state = open_state(place, plan.fingerprint)
        if state.chosen is not None:
            return _result(place, state)
        _refuse(disk_problems(plan, place, options.keep))
        for left in unfinished(place):
            remove(left)
        state.save(place)
        judge = make_judge(plan, merge_options)
        if not state.steps:
            _refuse(data_problems(plan, judge, merge_options))
        loop = _Loop(
            Workplace(place, plan, merge_options, options.keep, state, judge, say, progress),
            _watch(plan, place, options.watch, say),
            on_step or (lambda record: None),
        )
        return loop.complete()


def _result(out: Path, state: State) -> StreamResult:
    assert state.chosen is not None
    assert state.stopped is not None
    return StreamResult(out, out / MODEL, state.chosen, state.stopped, list(state.steps))


def _refuse(problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more: --dry-run lists them)" if problems[1:] else ""
        raise InputError(problems[0] + more)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    # The system drops the lock when its holder dies, by whatever signal.
    lock = FileLock(out / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"{out}: another process runs this stream; wait for it") from error
    try:
        yield
    finally:
        lock.release()


def _watch(
    plan: StreamPlan, out: Path, options: WatchOptions | None, say: Callable[[str], None]
) -> Watch | None:
    if options is None:
        return None
    assert isinstance(plan.config.checkpoints, str)
    folder = Path(plain_path(plan.config.checkpoints))
    return Watch(folder, out / INCOMING, plan.config.base_model, options, say)


@dataclass
class _Loop:
    """The loop over steps."""

    place: Workplace
    watch: Watch | None
    on_step: Callable[[StepRecord], None]
    drawn: float = float("-inf")

    def complete(self) -> StreamResult:
        """Do every step that is still to do, then the final model."""
        state = self.place.state
        self.place.prune()
        self.place.write_journal()
        if state.stopped is None:
            self._all_steps()
        self._finish()
        return _result(self.place.out, state)

    def _all_steps(self) -> None:
        place, state = self.place, self.place.state
        while state.stopped is None:
            planned = self._next()
            if isinstance(planned, str):
                state.stopped = planned
                state.save(place.out)
                break
            if place.judge is not None:
                place.judge.add_reference(planned.checkpoint.reference)
            if state.base is None:
                # Not before a checkpoint is there, whose chat template may be needed.
                state.base = place.score(place.plan.config.base_model)
                state.save(place.out)
            record = take_step(place, planned)
            state.steps.append(record)
            state.stopped = self._reason_to_stop()
            state.save(place.out)
            self._tidy()
            self.on_step(record)
            self._tell_time_left()

    def _next(self) -> PlannedStep | str:
        """Return the next step, or why there is none."""
        plan, done = self.place.plan, len(self.place.state.steps)
        if self.watch is None:
            steps = plan.steps()
            return steps[done] if done < len(steps) else "all checkpoints are merged"
        after = self._last_number()
        self.watch.forget(after)
        if plan.rates is not None and plan.step(done + 1, RunCheckpoint("", "")) is None:
            return "the list of learning rates is used up"
        found = self.watch.next(after)
        if isinstance(found, str):
            if not done:
                raise Failure(f"{self.watch.folder}: no checkpoint came ({found}); run again")
            return found
        planned = plan.step(done + 1, found[1])
        assert planned is not None  # it has a learning rate, as was just seen
        return planned

    def _last_number(self) -> int:
        steps = self.place.state.steps
        return int(steps[-1].checkpoint.rpartition("-")[2]) if steps else -1

    def _reason_to_stop(self) -> str | None:
        evaluation, state = self.place.plan.config.evaluation, self.place.state
        if evaluation is None or evaluation.patience is None:
            return None
        since = len(state.steps) - state.best
        if since < evaluation.patience:
            return None
        return f"no step was better for {since} steps (patience)"

    def _tell_time_left(self) -> None:
        """Say what the rest will take once the first step has shown how long one is."""
        left = seconds_left(self.place.plan, self.place.state)
        if len(self.place.state.steps) == 1 and left is not None and left >= 60:
            # The first measures the model, which others may not.
            self.place.say(f"at most about {duration_text(left)} for the other steps, by the first")

    def _tidy(self) -> None:
        place = self.place
        place.prune()
        place.write_journal()
        if place.merge.lora_merge_cache == str(place.out / LORA_CACHE):
            remove(place.out / LORA_CACHE)
        if time.monotonic() - self.drawn > _DRAW_EVERY:
            draw_stream(place.state, place.out / PLOT)
            self.drawn = time.monotonic()

    def _finish(self) -> None:
        place, state = self.place, self.place.state
        chosen = place.chosen
        if chosen == 0 and state.steps:
            place.say("no step was better than the base: the final model is the base")
        document = cast_document(place.model_of(chosen), place.plan.final_dtype)
        model = place.out / MODEL
        if not model.is_dir():
            merge_adapter(place.model_of(chosen), place.merge)
            copies = place.merge.copy_tokenizer and place.plan.has_tokenizer
            options = place.merge.model_copy(update={"copy_tokenizer": copies})
            with forgetting([place.model_of(chosen)], []):
                merge(document, to_yaml(document), model, options)
        # A finished model is published as it lies there: nothing half-written goes into it.
        card = stream_card(place.plan.config, state, chosen)
        write_text(model / CARD, card, staging=place.out)
        draw_stream(state, place.out / PLOT)
        place.prune(finished=True)
        remove(place.out / INCOMING)
        remove(place.out / LORA_CACHE)
        # Last of all: a stream whose model is chosen is finished, and nothing of it is touched.
        state.chosen = chosen
        state.save(place.out)
