"""The checkpoints of a run: found in a Trainer's output directory, or listed."""

from __future__ import annotations

import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from safetensors import SafetensorError, safe_open

from mergekit_arm.errors import InputError, first_line
from mergekit_arm.models.contents import describe, is_adapter, missing_part, weight_files
from mergekit_arm.models.references import absolute_reference, plain_path
from mergekit_arm.streaming.config import StreamConfig
from mergekit_arm.streaming.state import State

TRAINER_STATE = "trainer_state.json"
_NUMBERED = re.compile(r"checkpoint-(\d+)")
_UNREADABLE = (
    OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError
)  # fmt: skip


@dataclass(frozen=True)
class RunCheckpoint:
    """One model to merge in."""

    name: str
    """Short, for tables: ``checkpoint-100``, or the reference itself."""
    reference: str
    """In mergekit's grammar, local paths absolute; an adapter comes with its base."""


Group = tuple[RunCheckpoint, ...]
"""What one step merges: one checkpoint, or one of each of several runs."""


def list_checkpoints(
    config: StreamConfig, state: State | None, say: Callable[[str], None]
) -> list[Group]:
    """Return what one pass merges: the list of the file, or what its directory holds and held.

    Of a directory in the order of training; what is incomplete, or comes too late, is left out,
    and ``say`` is told.

    Raises:
        InputError: there is none, or something that is not a model.
    """
    setting, base = config.checkpoints, config.base_model
    if isinstance(setting, list):
        groups = [one if isinstance(one, list) else [one] for one in setting]
        return [tuple(_listed(one, base) for one in group) for group in groups]
    folder = Path(plain_path(setting))
    handled = [one.checkpoint for one in (state.handled if state else [])]
    found = {
        number_of(name): RunCheckpoint(name, str(folder / name))
        for name in handled
        if number_of(name) >= 0  # else of a list, which is another stream
    }
    last = max(found, default=-1)
    for number, path in numbered_checkpoints(folder).items():
        problem = missing_part(path)
        if problem:
            say(f"{path.name} is left out: it is not complete ({problem})")
        elif config.passes == 1 and number < last and number not in found:
            say(
                f"{path.name} is left out: a later checkpoint, checkpoint-{last}, is merged already"
            )
        else:
            found[number] = checkpoint_at(path.name, str(path), base)
    if not found:
        raise _none_in(folder, setting)
    return [(found[number],) for number in sorted(found)]


def _none_in(folder: Path, setting: str) -> InputError:
    """Return the refusal of a directory without checkpoints, with what is likely meant."""
    if not folder.is_dir():
        return InputError(
            f"checkpoints: {setting} is no directory; name a Trainer's output directory, or list "
            "models: [org/model, ./path]"
        )
    # A model's own directory is the likeliest mistake.
    own = missing_part(folder) is None
    remedy = f"it is a model itself: write checkpoints: [{setting}]" if own else "train first"
    return InputError(f"checkpoints: {setting} holds no complete checkpoint-N; {remedy}")


def number_of(name: str) -> int:
    """Return N of ``checkpoint-N``, -1 of another name."""
    found = _NUMBERED.fullmatch(name)
    return int(found[1]) if found else -1


def reached(state: State | None) -> int:
    """Return N of the last checkpoint that is behind a stream, -1 where none is."""
    return max((number_of(one.checkpoint) for one in (state.handled if state else [])), default=-1)


def problem_of(reference: str) -> str | None:
    """Say why a checkpoint cannot be merged: it is gone, unreadable, or holds no number somewhere.

    Reads all of its weights, which the merge then finds in memory.
    """
    parsed = ModelReference.parse(reference)
    part = parsed.lora or parsed.model
    try:
        describe(str(part))
        folder = Path(ModelReference(model=part).local_path())
        for file in weight_files(folder):
            broken = _not_finite(file)
            if broken:
                return f"{broken} in {file.name} holds a value that is no finite number"
    except InputError as error:
        return error.message
    except _UNREADABLE as error:
        return f"{part}: cannot be read ({first_line(error)})"
    return None


def _not_finite(file: Path) -> str | None:
    """Return the name of a tensor with a value that is NaN or infinite."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            return next((n for n in opened.keys() if _is_broken(opened.get_tensor(n))), None)  # noqa: SIM118
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    tensors = saved.get("state_dict", saved)
    return next((name for name, tensor in tensors.items() if _is_broken(tensor)), None)


def _is_broken(tensor: Any) -> bool:
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or not tensor.numel():
        return False
    if tensor.itemsize == 1:
        tensor = tensor.float()  # eight-bit floats have no minimum
    # One pass, and nothing of the tensor's size: both are NaN where any value is.
    return not all(math.isfinite(float(one)) for one in torch.aminmax(tensor))


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the ``checkpoint-N`` directories of ``folder`` by N, ascending."""
    if not folder.is_dir():
        return {}
    found = {number_of(path.name): path for path in folder.iterdir() if path.is_dir()}
    return dict(sorted((number, path) for number, path in found.items() if number >= 0))


def _listed(reference: str, base_model: str) -> RunCheckpoint:
    """Return the checkpoint that one entry of a list means."""
    absolute = absolute_reference(reference)
    if absolute == absolute_reference(base_model):
        raise InputError(f"checkpoints: {reference} is the base_model; remove it from the list")
    return checkpoint_at(reference, absolute, base_model)


def checkpoint_at(name: str, reference: str, base_model: str) -> RunCheckpoint:
    """Return the checkpoint at an absolute ``reference``, with the base where it is an adapter.

    Raises:
        InputError: the base is an adapter on a model already, and mergekit stacks none.
    """
    if not is_adapter(Path(reference)):
        return RunCheckpoint(name, reference)
    base = absolute_reference(base_model)
    if "+" in base:
        raise InputError(
            f"checkpoints: {reference} is an adapter and so is {base_model}; merge base_model "
            "into one model first"
        )
    return RunCheckpoint(name, f"{base}+{reference}")


def is_last(path: Path) -> bool:
    """Say whether a Trainer's checkpoint is the one of its final training step."""
    try:
        state = json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(0 < state.get("max_steps", 0) <= state.get("global_step", -1))
