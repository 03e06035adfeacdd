"""What is known of a stream before its next step, and everything that is wrong with it.

A dry run shows all of it; a stream refuses the first problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.reading import choose_tokenizer
from mergekit_arm.data.corpus import read_corpus
from mergekit_arm.errors import InputError, did_you_mean
from mergekit_arm.files import size_of, try_writing
from mergekit_arm.judging.judge import Judge, Progress
from mergekit_arm.machine import free_disk
from mergekit_arm.merging.options import complete_options
from mergekit_arm.merging.room import Room, room_in
from mergekit_arm.models.loading import choose_device, find_model
from mergekit_arm.models.references import plain_path
from mergekit_arm.models.tensors import open_tensors
from mergekit_arm.sections import section
from mergekit_arm.statistics.read import open_statistics
from mergekit_arm.streaming.config import StreamConfig, load_config
from mergekit_arm.streaming.judge import make_judge
from mergekit_arm.streaming.layout import STATE_FILE
from mergekit_arm.streaming.options import Keep, StreamOptions
from mergekit_arm.streaming.plan.checks import Checks
from mergekit_arm.streaming.plan.document import STEP_BYTES
from mergekit_arm.streaming.plan.plan import StreamPlan, make_plan
from mergekit_arm.streaming.state import State, read_state
from mergekit_arm.units import size_text


@dataclass(frozen=True)
class Forecast:
    """What is known of a stream before its next step."""

    plan: StreamPlan | None
    """None where too little of the configuration holds together."""
    merge: MergeOptions
    """For every merge."""
    state: State | None
    """What ``OUT`` holds already."""
    judge: Judge | None
    """Of the models; None without an evaluation."""
    needs: Room | None
    """At the stream's peak, without statistics, and without what an evaluation or a calibration
    takes; None where something is wrong."""
    problems: list[str]

    @property
    def seconds(self) -> float | None:
        """For the steps that are left, by those that are done; None before the first."""
        return seconds_left(self.plan, self.state) if self.plan else None


def forecast_stream(
    config: StreamConfig | Mapping[str, Any] | str | Path,
    out: str | Path,
    options: StreamOptions | None = None,
) -> Forecast:
    """Check a stream and forecast what it takes. Loads no model, leaves no file.

    Args:
        config: as ``stream`` takes it.
        out: a new directory, or that of the same stream.
        options: as ``stream`` will be given them.

    Raises:
        InputError: ``config`` is no stream's. All else that is wrong is among the problems.
    """
    out = Path(plain_path(out))
    return look_ahead(load_config(config), out, options or StreamOptions(), dry=True)


def look_ahead(
    config: StreamConfig,
    out: Path,
    options: StreamOptions,
    *,
    dry: bool = False,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Forecast:
    """Return what a stream will do and what is wrong with it.

    ``dry``: look at the data also of a stream that has begun, whose loop would do so itself.
    ``say`` and ``progress`` are the judge's.
    """
    check, merge = Checks(), complete_options(options.merge, out)
    state = check.run(lambda: read_state(out))
    watched = options.watch is not None
    plan, problems = make_plan(config, merge, watched=watched, state=state)
    check.problems += problems
    check.run(lambda: _check_keep(plan, options.keep))
    if plan is None:
        return Forecast(None, merge, state, None, None, check.problems)
    judge = make_judge(plan, merge, out, state, say, progress)
    if dry or (state is None and not check.problems):
        check.run(lambda: _check_writable(out))
        check.run(lambda: _check_calibration(plan, merge))
        check.run(lambda: _check_evaluation(plan, judge))
    needs = None
    if not check.problems:
        needs = room_in(out, disk_needed(plan, options.keep), _memory(plan, merge))
        if watched or plan.steps(state):
            check.run(lambda: check_disk(plan, out, options.keep))
    return Forecast(plan, merge, state, judge, needs, check.problems)


def seconds_left(plan: StreamPlan, state: State | None) -> float | None:
    """Return how long the steps to come take if they are as those that ``state`` holds.

    None where no step was timed yet, or where their number is not known.
    """
    if plan.length is None or state is None or not state.steps:
        return None
    spent = sum(sum(record.seconds.values()) for record in state.steps)
    return spent / len(state.steps) * (plan.length - state.position)


def check_disk(plan: StreamPlan, out: Path, keep: Keep) -> None:
    """Refuse a disk that cannot hold the stream; what ``out`` holds already counts as free."""
    needed = disk_needed(plan, keep)
    free = free_disk(out) + (size_of(out) if out.is_dir() else 0)
    if needed > free:
        sizes = f"about {size_text(needed)} of disk and {size_text(free)} are free"
        raise InputError(f"{out}: the stream needs {sizes}: put OUT elsewhere, or use --keep last")


def disk_needed(plan: StreamPlan, keep: Keep) -> int:
    """Return the bytes of weights at the peak: kept models in float32, one in progress, the final.

    An adapter's merged model counts once more. Statistics are left out.
    """
    evaluation = plan.config.evaluation
    models = 2 + (evaluation is not None and evaluation.keep == "best")
    if keep == "all" and plan.length is not None:
        models = max(models, plan.length)
    groups = plan.checkpoints or []
    adapters = max((sum("+" in one.reference for one in group) for group in groups), default=0)
    final: torch.dtype = getattr(torch, plan.final_dtype)
    return plan.base.parameters * ((models + adapters) * STEP_BYTES + final.itemsize)


def _memory(plan: StreamPlan, merge: MergeOptions) -> int:
    """Return what a merge holds: a shard until it is full, and one tensor's inputs and result."""
    largest = max((math.prod(shape) for shape in plan.base.shapes.values()), default=0)
    shard = min(plan.base.parameters * STEP_BYTES, int(merge.out_shard_size))
    return shard + 5 * largest * STEP_BYTES


def _check_keep(plan: StreamPlan | None, keep: str) -> None:
    known = get_args(Keep)
    if keep not in known:
        meant = did_you_mean(str(keep), known)
        raise InputError(f"keep must be {', '.join(known)}, not {keep!r}{meant}")
    if plan is not None and keep == "best" and plan.config.evaluation is None:
        raise InputError("--keep best: without evaluation no step is the best; use all or last")


def _check_writable(out: Path) -> None:
    try:
        try_writing(out / STATE_FILE)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}; give another OUT") from error


def _check_calibration(plan: StreamPlan, merge: MergeOptions) -> None:
    if plan.calibration is None:
        return
    if plan.published:
        _check_published(plan)
        if plan.calibration.refresh == "once":
            return
    # Without its adapter, which would be merged for nothing, and by a dry run into OUT.
    base = str(ModelReference.parse(plan.config.base_model).model)
    with find_model(base, trust_remote_code=merge.trust_remote_code), section("calibration"):
        for settings in plan.calibration.passes():
            options = CalibrationOptions(
                plan.config.base_model,
                out="",
                trust_remote_code=merge.trust_remote_code,
                **settings,
            )
            choose_device(options.device)
            read_corpus(options.data(), choose_tokenizer(options))


def _check_published(plan: StreamPlan) -> None:
    """Look at a few weights whether the statistics at hand are the base's."""
    base = ModelReference.parse(plan.config.base_model)
    if base.lora is not None or not Path(base.model.path).is_dir():
        return  # mergekit's planning of the first step looks at every weight
    tensors = open_tensors(base.model.path, Path(base.model.path))
    for key, reference in plan.published.items():
        with section(f"parameters: {key}"):
            matcher = open_statistics(reference).matcher
            known = [name for name in tensors.names if name in matcher.weights]
            for name in known[:: max(1, len(known) // 4)]:
                matcher.find(name, tensors.get(name))


def _check_evaluation(plan: StreamPlan, judge: Judge | None) -> None:
    if judge is None:
        return
    with section("evaluation"):
        choose_device(judge.device)
    # Under --watch the chat template may come with the first checkpoint.
    if plan.checkpoints is not None:
        judge.data()
