"""What a stream will take: time, disk, memory. Rough, from a small measurement of this machine."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from mergekit.options import MergeOptions

from mergekit_arm.calibration.model import DTYPES, choose_device, choose_dtype
from mergekit_arm.errors import InputError
from mergekit_arm.streaming.files import size_of
from mergekit_arm.streaming.plan import Plan
from mergekit_arm.streaming.scoring import LOGIT_ELEMENTS
from mergekit_arm.streaming.workplace import Keep
from mergekit_arm.units import size_text

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
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


def check_disk(plan: Plan, out: Path, keep: Keep) -> None:
    """Refuse a stream that the disk cannot hold.

    Raises:
        InputError: too little space, counting what ``out`` holds already.
    """
    needed, free = disk_needed(plan, keep), _free(out) + (size_of(out) if out.is_dir() else 0)
    if needed > free:
        raise InputError(
            f"{out}: the stream needs about {size_text(needed)} of disk and {size_text(free)} are "
            "free: put OUT elsewhere, or use --keep last"
        )


def disk_needed(plan: Plan, keep: Keep) -> int:
    """Return the bytes of weights at the peak: kept models in float32, one in progress, the final.

    An adapter's merged model counts once more. Statistics are left out.
    """
    running = plan.base.parameters * _BYTES["float32"]
    evaluation = plan.config.evaluation
    models = 2 + (evaluation is not None and evaluation.keep == "best")
    if keep == "all" and plan.length is not None:
        models = max(models, plan.length)
    adapters = any("+" in checkpoint.reference for checkpoint in plan.checkpoints or [])
    final = plan.base.parameters * _BYTES[plan.final_dtype]
    return running * (models + adapters) + final


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
    if "subspace" in plan.method.statistics:
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


def _free(out: Path) -> int:
    return shutil.disk_usage(_existing(out)).free


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
