"""The dry run: everything that is known of a stream, and everything that is wrong with it."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from mergekit.options import MergeOptions

from mergekit_arm.errors import InputError
from mergekit_arm.judging.loss import LOGIT_ELEMENTS
from mergekit_arm.machine import free_disk, free_memory
from mergekit_arm.models.loading import choose_device, choose_dtype
from mergekit_arm.streaming.config import StreamConfig
from mergekit_arm.streaming.data_checks import (
    data_problems,
    disk_needed,
    disk_problems,
    keep_problems,
    make_judge,
)
from mergekit_arm.streaming.options import StreamOptions, complete_options
from mergekit_arm.streaming.plan.checks import Checks
from mergekit_arm.streaming.plan.document import STEP_BYTES
from mergekit_arm.streaming.plan.plan import StreamPlan, make_plan
from mergekit_arm.streaming.state import State, open_state, read_state
from mergekit_arm.units import size_text

_LIBRARIES = 700 << 20  # bytes resident once torch, transformers and mergekit are imported


@dataclass(frozen=True)
class Needs:
    """What a stream takes at its peak and what this machine has, in bytes, without statistics."""

    disk: int
    disk_free: int
    memory: int
    """Of the main memory."""
    memory_free: int


@dataclass(frozen=True)
class Forecast:
    """What ``--dry-run`` prints."""

    plan: StreamPlan | None
    """None where too little of the configuration holds together."""
    needs: Needs | None
    """None where something is wrong."""
    done: int
    """Steps that ``OUT`` holds already."""
    seconds: float | None
    """For the steps that are left, by those that are done; None before the first."""
    problems: list[str]


def forecast(config: StreamConfig, out: Path, options: StreamOptions) -> Forecast:
    """Check a stream and forecast what it takes. Loads no model, leaves no file."""
    merge = complete_options(options.merge, out)
    plan, problems = make_plan(config, merge, options.watch)
    problems += keep_problems(plan, options.keep)
    if plan is None:
        return Forecast(None, None, 0, None, problems)
    check = Checks(problems)
    state = None
    if check.run(lambda: read_state(out)) is not None:
        state = check.run(lambda: open_state(out, plan.fingerprint))
    check.run(lambda: _check_writable(out))
    problems += data_problems(plan, make_judge(plan, merge), merge)
    needs = None
    if not problems:
        needs = Needs(
            disk=disk_needed(plan, options.keep),
            disk_free=free_disk(out),
            memory=_memory(plan, merge),
            memory_free=free_memory(torch.device("cpu")),
        )
        problems += disk_problems(plan, out, options.keep)
        if needs.memory > needs.memory_free:
            problems.append(
                f"memory: about {size_text(needs.memory)} needed at the peak, "
                f"{size_text(needs.memory_free)} free: lower --out-shard-size, or evaluate "
                "in dtype: bfloat16"
            )
    if state is None:
        return Forecast(plan, needs, 0, None, problems)
    return Forecast(plan, needs, len(state.steps), seconds_left(plan, state), problems)


def seconds_left(plan: StreamPlan, state: State) -> float | None:
    """Return how long the steps to come take if they are as those that ``state`` holds.

    None where no step was timed yet, or where their number is not known.
    """
    if plan.length is None or not state.steps:
        return None
    spent = sum(sum(record.seconds.values()) for record in state.steps)
    return spent / len(state.steps) * (plan.length - len(state.steps))


def _check_writable(out: Path) -> None:
    existing = next(folder for folder in (out, *out.parents) if folder.is_dir())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}; give another OUT") from error


def _memory(plan: StreamPlan, merge: MergeOptions) -> int:
    parameters = plan.base.parameters
    largest = max((math.prod(shape) for shape in plan.base.shapes.values()), default=0)
    # mergekit holds a shard until it is full, and a tensor's inputs, their difference, the result.
    shard = min(parameters * STEP_BYTES, int(merge.out_shard_size))
    merging = shard + 5 * largest * STEP_BYTES
    evaluation = plan.config.evaluation
    wanted = []
    if evaluation is not None and evaluation.dataset is not None:
        wanted.append((evaluation.device, evaluation.dtype))
    if plan.calibration is not None:
        wanted += [(one["device"], one["dtype"]) for one in plan.calibration.passes()]
    running = [
        parameters * choose_dtype(dtype, choose_device(device)).itemsize + 3 * LOGIT_ELEMENTS * 4
        for device, dtype in wanted
    ]
    return _LIBRARIES + max([merging, *running])
