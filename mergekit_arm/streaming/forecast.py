"""The dry run: everything that is known of a stream, and everything that is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.options import MergeOptions

from mergekit_arm.errors import InputError
from mergekit_arm.files import try_writing
from mergekit_arm.machine import free_disk, free_memory
from mergekit_arm.merging.options import complete_options
from mergekit_arm.streaming.config import StreamConfig, load_config
from mergekit_arm.streaming.data_checks import (
    data_problems,
    disk_needed,
    disk_problems,
    keep_problems,
)
from mergekit_arm.streaming.judge import make_judge
from mergekit_arm.streaming.layout import STATE_FILE
from mergekit_arm.streaming.options import StreamOptions
from mergekit_arm.streaming.plan.checks import Checks
from mergekit_arm.streaming.plan.document import STEP_BYTES
from mergekit_arm.streaming.plan.plan import StreamPlan, make_plan
from mergekit_arm.streaming.references import plain_path
from mergekit_arm.streaming.state import State, read_state

_LIBRARIES = 700 << 20  # bytes resident once torch, transformers and mergekit are imported


@dataclass(frozen=True)
class Needs:
    """What a stream takes at its peak and what this machine has, in bytes, without statistics."""

    disk: int
    disk_free: int
    memory: int
    """Of the main memory, for a merge; an evaluation or a calibration takes the model itself."""
    memory_free: int


@dataclass(frozen=True)
class Forecast:
    """What ``--dry-run`` prints."""

    plan: StreamPlan | None
    """None where too little of the configuration holds together."""
    needs: Needs | None
    """None where something is wrong."""
    state: State | None
    """What ``OUT`` holds already."""
    seconds: float | None
    """For the steps that are left, by those that are done; None before the first."""
    problems: list[str]


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
    config, options, out = load_config(config), options or StreamOptions(), Path(plain_path(out))
    merge = complete_options(options.merge, out)
    check = Checks()
    state = check.run(lambda: read_state(out))
    plan, problems = make_plan(config, merge, watched=options.watch is not None, state=state)
    problems += keep_problems(plan, options.keep) + check.problems
    if plan is None:
        return Forecast(None, None, state, None, problems)
    Checks(problems).run(lambda: _check_writable(out))
    problems += data_problems(plan, make_judge(plan, merge, out), merge)
    needs = None
    if not problems:
        needs = Needs(
            disk=disk_needed(plan, options.keep),
            disk_free=free_disk(out),
            memory=_memory(plan, merge),
            memory_free=free_memory(torch.device("cpu")),
        )
        problems += disk_problems(plan, out, options.keep)
    return Forecast(plan, needs, state, seconds_left(plan, state), problems)


def seconds_left(plan: StreamPlan, state: State | None) -> float | None:
    """Return how long the steps to come take if they are as those that ``state`` holds.

    None where no step was timed yet, or where their number is not known.
    """
    if plan.length is None or state is None or not state.steps:
        return None
    spent = sum(sum(record.seconds.values()) for record in state.steps)
    return spent / len(state.steps) * (plan.length - state.position)


def _check_writable(out: Path) -> None:
    try:
        try_writing(out / STATE_FILE)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}; give another OUT") from error


def _memory(plan: StreamPlan, merge: MergeOptions) -> int:
    """Return what a merge holds: a shard until it is full, and one tensor's inputs and result."""
    largest = max((math.prod(shape) for shape in plan.base.shapes.values()), default=0)
    shard = min(plan.base.parameters * STEP_BYTES, int(merge.out_shard_size))
    return _LIBRARIES + shard + 5 * largest * STEP_BYTES
