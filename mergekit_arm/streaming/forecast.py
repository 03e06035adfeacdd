"""The dry run: everything that is known of a stream, and everything that is wrong with it."""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from mergekit.options import MergeOptions

from mergekit_arm.errors import InputError
from mergekit_arm.models.loading import DTYPES, choose_device, choose_dtype
from mergekit_arm.statistics.kinds.subspace import SUBSPACE
from mergekit_arm.streaming.config import StreamConfig
from mergekit_arm.streaming.data_checks import (
    _BYTES,
    _existing,
    _free,
    data_problems,
    disk_needed,
    keep_problems,
    make_judge,
)
from mergekit_arm.streaming.evaluation.score import LOGIT_ELEMENTS
from mergekit_arm.streaming.options import Keep, StreamOptions, complete_options
from mergekit_arm.streaming.plan.plan import Plan, make_plan
from mergekit_arm.streaming.state import open_state, read_state
from mergekit_arm.units import size_text


@dataclass(frozen=True)
class Forecast:
    """What ``--dry-run`` prints."""

    plan: Plan | None
    """None where too little of the configuration holds together."""
    estimate: Estimate | None
    done: int
    """Steps that ``OUT`` holds already."""
    problems: list[str]


def forecast(config: StreamConfig, out: Path, options: StreamOptions) -> Forecast:
    """Check a stream and forecast what it takes. Writes nothing but a small temporary file."""
    merge = complete_options(options.merge, out)
    plan, problems = make_plan(config, merge, options.watch)
    problems += keep_problems(plan, options.keep)
    done = 0
    try:
        if plan is not None and read_state(out) is not None:
            done = len(open_state(out, plan.fingerprint).steps)
    except InputError as error:
        problems.append(error.message)
    if plan is None:
        return Forecast(None, None, done, problems)
    problems += data_problems(plan, make_judge(plan, merge), merge)
    costs = None
    if not problems:
        try:
            costs = estimate(plan, out, merge, options.keep)
            problems += costs.problems()
        except InputError as error:
            problems.append(error.message)
    return Forecast(plan, costs, done, problems)


_LIBRARIES = 700 << 20  # resident once torch, transformers and mergekit are imported


_STEP_OVERHEAD = 1.0  # seconds: planning, opening, tokenising


_SUBSPACE = 128  # columns of a typical basis: what rotating costs beside reading


_EFFICIENCY = 0.4  # of a large product's speed, in a model's forward pass


@dataclass(frozen=True)
class Estimate:
    """A forecast. Bytes and seconds; ``seconds`` is None where the number of steps is unknown."""

    seconds: float | None
    seconds_per_step: float
    disk: int
    """At the peak, without statistics."""
    disk_free: int
    memory: int
    """Of the main memory, at the peak."""
    memory_free: int

    def problems(self) -> list[str]:
        """Return what this machine lacks."""
        found = []
        if self.disk > self.disk_free:
            found.append(
                f"disk: about {size_text(self.disk)} needed at the peak, "
                f"{size_text(self.disk_free)} free: put OUT elsewhere, or use --keep last"
            )
        if self.memory > self.memory_free:
            found.append(
                f"memory: about {size_text(self.memory)} needed at the peak, "
                f"{size_text(self.memory_free)} free: lower --out-shard-size, or evaluate "
                "in dtype: bfloat16"
            )
        return found


def estimate(plan: Plan, out: Path, merge: MergeOptions, keep: Keep) -> Estimate:
    """Forecast a stream after timing one matrix product and one small file.

    Raises:
        InputError: nothing can be written where ``out`` is to be.
    """
    per_step = _seconds_per_step(plan, out, merge)
    steps = plan.length
    return Estimate(
        seconds=None if steps is None else per_step * steps,
        seconds_per_step=per_step,
        disk=disk_needed(plan, keep),
        disk_free=_free(out),
        memory=_memory(plan, merge),
        memory_free=int(psutil.virtual_memory().available),
    )


def _memory(plan: Plan, merge: MergeOptions) -> int:
    parameters = plan.base.parameters
    largest = max((_size(shape) for shape in plan.base.shapes.values()), default=0)
    # mergekit holds a shard until it is full, and a tensor's inputs, their difference, the result.
    shard = min(parameters * _BYTES["float32"], int(merge.out_shard_size))
    merging = shard + 5 * largest * 4
    running = 0
    settings = [plan.config.evaluation] if plan.config.evaluation is not None else []
    wanted = [(one.device, one.dtype) for one in settings if one.dataset is not None]
    if plan.calibration is not None:
        wanted.append((plan.calibration.settings["device"], plan.calibration.settings["dtype"]))
    for device_name, dtype_name in wanted:
        dtype = choose_dtype(dtype_name, choose_device(device_name))
        size = next(_BYTES[name] for name, known in DTYPES.items() if known == dtype)
        running = max(running, parameters * size + 3 * LOGIT_ELEMENTS * 4)
    return _LIBRARIES + max(merging, running)


def _seconds_per_step(plan: Plan, out: Path, merge: MergeOptions) -> float:
    parameters = plan.base.parameters
    tokens = 0.0
    device = "cpu"
    if plan.calibration is not None:
        settings = plan.calibration.settings
        steps = plan.steps()
        measured = sum(step.measures for step in steps) / len(steps) if steps else 1.0
        tokens += measured * settings["samples"] * settings["sequence_length"]
        device = settings["device"]
    evaluation = plan.config.evaluation
    if evaluation is not None and evaluation.dataset is not None:
        # The step's model and, in the first pass, the checkpoint.
        scored = 1 + 1 / plan.config.passes
        tokens += scored * evaluation.samples * evaluation.sequence_length
        device = evaluation.device
    forward = 2.0 * parameters * tokens / (_EFFICIENCY * _flops(choose_device(device)))
    rotating = 0.0
    if SUBSPACE.name in plan.method.statistics:
        rotating = 8.0 * parameters * _SUBSPACE / _flops(choose_device(merge.device or "cpu"))
    # Read: current and checkpoint, these and the result again to compare them. Written: one.
    traffic = 6 * parameters * _BYTES["float32"] / _disk_speed(out)
    return _STEP_OVERHEAD + forward + rotating + traffic


def _flops(device: torch.device) -> float:
    """Return floating-point operations per second of a large float32 product."""
    size = 768 if device.type == "cpu" else 4096
    a = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        float((a @ a)[0, 0])  # copying one number waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def _disk_speed(out: Path) -> float:
    """Return bytes per second of writing a small file beside ``out``, flushed."""
    block = os.urandom(16 << 20)
    try:
        with tempfile.TemporaryFile(dir=_existing(out)) as file:
            begun = time.perf_counter()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return len(block) / (time.perf_counter() - begun)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}; give another OUT") from error


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
