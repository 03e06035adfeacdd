"""What is known of a stream before its next step, and everything that is wrong with it.

A dry run shows all of it; a stream refuses the first problem.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.reading import check_calibration
from mergekit_arm.errors import InputError, check_choice
from mergekit_arm.files import size_of, try_writing
from mergekit_arm.judging.judge import Judge
from mergekit_arm.merging.options import complete_options
from mergekit_arm.merging.room import Room, room_in
from mergekit_arm.methods.arm import TASK
from mergekit_arm.methods.base import STATS
from mergekit_arm.models.loading import choose_device
from mergekit_arm.models.references import plain_path
from mergekit_arm.models.tensors import open_tensors
from mergekit_arm.sections import section
from mergekit_arm.statistics.format import WeightRecord
from mergekit_arm.statistics.kinds.subspace import SUBSPACE
from mergekit_arm.statistics.read import Statistics, open_statistics
from mergekit_arm.streaming.config import StreamConfig, load_config
from mergekit_arm.streaming.layout import METRIC_LOG, MODEL, STATE_FILE, step_folder
from mergekit_arm.streaming.options import Keep, StreamOptions
from mergekit_arm.streaming.plan.checks import Checks, energy_read
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
    *,
    reads_data: bool = True,
) -> Forecast:
    """Check a stream and forecast what it takes. Loads no model, leaves no file.

    Args:
        config: as ``stream`` takes it.
        out: a new directory, or that of the same stream.
        options: as ``stream`` will be given them.
        reads_data: also of a stream that has begun, whose next step would do so itself.

    Raises:
        InputError: ``config`` is no stream's. All else that is wrong is among the problems.
    """
    out, config, options = Path(plain_path(out)), load_config(config), options or StreamOptions()
    check, merge = Checks(), complete_options(options.merge, out)
    state = check.run(read_state, out)
    watched = options.watch is not None
    plan, problems = make_plan(config, merge, watched=watched, state=state)
    check += problems
    check.run(check_choice, "keep", options.keep, get_args(Keep))
    if options.keep == "best" and config.evaluation is None:
        check.append("--keep best: without evaluation no step is the best; use all or last")
    if plan is None:
        return Forecast(None, merge, state, None, None, check)
    judge = _judge(plan, merge, out, state)
    if reads_data or (state is None and not check):
        check.run(try_writing, out / STATE_FILE)
        check.run(_check_calibration, plan, merge)
        check.run(_check_evaluation, plan, judge)
    needs = None
    if not check:
        needs = room_in(out, disk_needed(plan, options.keep), _memory(plan, merge))
        if watched or plan.steps(state):
            check.run(check_disk, needs, out)
    return Forecast(plan, merge, state, judge, needs, check)


def seconds_left(plan: StreamPlan, state: State | None) -> float | None:
    """Return how long the steps to come take if they are as those that ``state`` holds.

    None where no step was timed yet, or where their number is not known.
    """
    if plan.length is None or state is None or not state.steps:
        return None
    spent = sum(sum(record.seconds.values()) for record in state.steps)
    return spent / len(state.steps) * (plan.length - state.position)


def check_disk(needs: Room, out: Path) -> None:
    """Refuse a disk that cannot hold the stream; what ``out`` holds already counts as free."""
    free = needs.disk_free + (size_of(out) if out.is_dir() else 0)
    if needs.disk > free:
        sizes = f"about {size_text(needs.disk)} of disk and {size_text(free)} are free"
        raise InputError(f"{out}: the stream needs {sizes}: put OUT elsewhere, or use --keep last")


def disk_needed(plan: StreamPlan, keep: Keep) -> int:
    """Return the bytes of weights at the peak: kept models in float32, one in progress, the final.

    An adapter's merged model counts once more; for the uniform average at the end those of all
    adapters lie there at once. Statistics are left out.
    """
    evaluation = plan.config.evaluation
    models = 2 + (evaluation is not None and evaluation.keep == "best")
    if keep == "all" and plan.length is not None:
        models = max(models, plan.length)
    groups = plan.checkpoints or []
    of_group = [sum("+" in one.reference for one in group) for group in groups]
    averages = evaluation is not None and plan.config.compare.average
    adapters = sum(of_group) if averages else max(of_group, default=0)
    final: torch.dtype = getattr(torch, plan.final_dtype)
    return plan.base.parameters * ((models + adapters) * STEP_BYTES + final.itemsize)


def _memory(plan: StreamPlan, merge: MergeOptions) -> int:
    """Return what a merge holds: a shard until it is full, and one tensor's inputs and result."""
    largest = max((math.prod(shape) for shape in plan.base.shapes.values()), default=0)
    shard = min(plan.base.parameters * STEP_BYTES, int(merge.out_shard_size))
    return shard + 5 * largest * STEP_BYTES


def _judge(plan: StreamPlan, merge: MergeOptions, out: Path, state: State | None) -> Judge | None:
    """Return what scores the stream's models, None without ``evaluation``."""
    evaluation = plan.config.evaluation
    if evaluation is None:
        return None
    # The chat template of any of them may stand in for the base's.
    steps = (step_folder(out, one.step) / MODEL for one in (state.steps if state else []))
    made = [str(one) for one in steps if one.is_dir()][:1]
    first = [one.reference for one in (plan.checkpoints or [()])[0]]
    return Judge(
        evaluation.sets,
        [plan.config.base_model, *made, *first],
        merge,
        evaluation.device,
        evaluation.dtype,
        plan.config.changes_tokens,
        named=evaluation.named,
        log=out / METRIC_LOG,
    )


def _check_calibration(plan: StreamPlan, merge: MergeOptions) -> None:
    if plan.calibration is None:
        return
    _check_published(plan)
    once = plan.calibration.refresh == "once"
    passes = dict(zip((STATS, TASK), plan.calibration.passes(), strict=False))
    with section("calibration"):
        for key, settings in passes.items():
            if once and key in plan.published:
                continue
            given = {**settings, "model": plan.config.base_model, "out": ""}
            options = CalibrationOptions(trust_remote_code=merge.trust_remote_code, **given)
            check_calibration(options)


def _check_published(plan: StreamPlan) -> None:
    """Look at a few weights whether the statistics at hand are the base's."""
    base = ModelReference.parse(plan.config.base_model)
    if base.lora is not None or not Path(base.model.path).is_dir():
        return  # mergekit's planning of the first step looks at every weight
    tensors = open_tensors(base.model.path, Path(base.model.path))
    for key, reference in plan.published.items():
        with section(f"parameters: {key}"):
            statistics = open_statistics(reference)
            matcher = statistics.matcher
            known = [name for name in tensors.names if name in matcher.weights]
            for name in known[:: max(1, len(known) // 4)]:
                matcher.find(name, tensors.get(name))
            if key == STATS:
                _check_energy(plan, statistics, [matcher.weights[name] for name in known])


def _check_energy(plan: StreamPlan, statistics: Statistics, records: list[WeightRecord]) -> None:
    """Look whether subspaces hold what the merge reads, where that is the same of every weight."""
    written = plan.config.parameters.get("energy")
    if "energy" not in plan.method.specs or plan.retains or isinstance(written, list | dict):
        return
    energy = energy_read(plan.config, plan.method)
    for record in records:
        if record.site is not None and SUBSPACE.measured(statistics):
            SUBSPACE.columns(statistics, record, energy)


def _check_evaluation(plan: StreamPlan, judge: Judge | None) -> None:
    if judge is None:
        return
    with section("evaluation"):
        choose_device(judge.device)
    # Under --watch the chat template may come with the first checkpoint.
    if plan.checkpoints is not None:
        judge.data()
