"""The checkpoints of a run: found in a Trainer's output directory, or listed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergekit_arm.errors import InputError
from mergekit_arm.models.contents import is_adapter, missing_part
from mergekit_arm.streaming.references import absolute_reference, plain_path

TRAINER_STATE = "trainer_state.json"
_NUMBERED = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class RunCheckpoint:
    """One model to merge in."""

    name: str
    """Short, for tables: ``checkpoint-100``, or the reference itself."""
    reference: str
    """In mergekit's grammar, local paths absolute; an adapter comes with its base."""


def find_checkpoints(
    setting: str | list[str], base_model: str, say: Callable[[str], None]
) -> list[RunCheckpoint]:
    """Return the checkpoints that ``setting`` means, in the order of training.

    Incomplete ones of a Trainer's directory are left out, and ``say`` is told.

    Raises:
        InputError: none, or something that is not a model.
    """
    if isinstance(setting, list):
        return [listed_checkpoint(reference, base_model) for reference in setting]
    folder = Path(plain_path(setting))
    if not folder.is_dir():
        raise InputError(
            f"checkpoints: {setting} is no directory; name a Trainer's output directory, or list "
            "models: [org/model, ./path]"
        )
    found: list[RunCheckpoint] = []
    numbered = numbered_checkpoints(folder)
    for path in numbered.values():
        problem = missing_part(path)
        if problem:
            say(f"{path.name} is left out: it is not complete ({problem})")
        else:
            found.append(trained_checkpoint(path, base_model))
    if not found:
        # A model's own directory is the likeliest mistake.
        own = missing_part(folder) is None
        remedy = f"it is a model itself: write checkpoints: [{setting}]" if own else "train first"
        raise InputError(f"checkpoints: {setting} holds no complete checkpoint-N; {remedy}")
    return found


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the ``checkpoint-N`` directories of ``folder`` by N, ascending."""
    if not folder.is_dir():
        return {}
    matches = [(path, _NUMBERED.fullmatch(path.name)) for path in folder.iterdir()]
    found = {int(match.group(1)): path for path, match in matches if match and path.is_dir()}
    return dict(sorted(found.items()))


def trained_checkpoint(path: Path, base_model: str) -> RunCheckpoint:
    """Return the checkpoint at a local directory, with ``base_model`` where it is an adapter."""
    reference = plain_path(path)
    return RunCheckpoint(
        path.name, adapted(base_model, reference) if is_adapter(path) else reference
    )


def listed_checkpoint(reference: str, base_model: str) -> RunCheckpoint:
    """Return the checkpoint that one entry of a list means.

    Raises:
        InputError: it is no reference, or the base model itself.
    """
    absolute = absolute_reference(reference)
    if absolute == absolute_reference(base_model):
        raise InputError(f"checkpoints: {reference} is the base_model; remove it from the list")
    if is_adapter(Path(absolute)):
        return RunCheckpoint(reference, adapted(base_model, absolute))
    return RunCheckpoint(reference, absolute)


def adapted(base_model: str, adapter: str) -> str:
    """Return ``base+adapter``.

    Raises:
        InputError: the base is an adapter on a model already, and mergekit stacks none.
    """
    base = absolute_reference(base_model)
    if "+" in base:
        raise InputError(
            f"checkpoints: {adapter} is an adapter and so is {base_model}; merge base_model "
            "into one model first"
        )
    return f"{base}+{adapter}"


def trained_on(reference: str) -> str | None:
    """Return the base that a local adapter names in its configuration."""
    _, plus, adapter = reference.partition("+")
    file = Path(adapter) / "adapter_config.json"
    if not plus or not file.is_file():
        return None
    name = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    return str(name) if name else None


def is_last(path: Path) -> bool:
    """Say whether a Trainer's checkpoint is the one of its final training step."""
    try:
        state = json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(0 < state.get("max_steps", 0) <= state.get("global_step", -1))
