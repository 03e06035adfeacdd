"""What a stream knows of itself on the disk: one file, replaced whole after every step.

A step counts once its record is in this file; what a killed stream had begun beyond it is
done again, or found finished and used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mergekit_arm.errors import InputError
from mergekit_arm.files import write_text
from mergekit_arm.streaming.judge import Score
from mergekit_arm.streaming.layout import BEFORE_STATE, STATE_FILE

STATE_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StepRecord(_Record):
    """One step: a line of ``stream.jsonl``."""

    step: int
    """From 1."""
    passed: int
    """Which pass over the checkpoints, from 1."""
    checkpoint: str
    reference: str
    learning_rate: float | None
    """With which the step was made; None where the method has none."""
    planned_rate: float | None
    """Before halvings."""
    attempts: int
    accepted: bool
    """False where every attempt made the loss worse: the model stayed as it was."""
    statistics_from: int | None
    """The step whose starting model was measured."""
    calibration_tokens: int
    """Measured in this step; 0 where statistics were carried over."""
    rotation_degrees: dict[str, float] | None
    """Mean and largest angle between update and task vector, over matrices."""
    update_norm: float
    task_norm: float
    current: Score
    base: Score
    latest_checkpoint: Score
    best_step: int
    """Up to here; 0 is the base."""
    seconds: dict[str, float]
    bytes: int
    """Of the weights that the step wrote, all attempts together."""


class State(_Record):
    """All of ``stream_state.json``."""

    format_version: int = STATE_VERSION
    fingerprint: dict[str, str]
    base: Score | None = None
    """None until the base was scored."""
    scores: dict[str, Score] = {}
    """Of checkpoints, by reference, so that a second pass does not repeat them."""
    steps: list[StepRecord] = []
    stopped: str | None = None
    """Why the stream ended; None while it runs."""
    chosen: int | None = None
    """The step that ``model`` is, once it is there."""

    @property
    def current(self) -> int:
        """The last accepted step; 0 is the base."""
        return next((record.step for record in reversed(self.steps) if record.accepted), 0)

    @property
    def best(self) -> int:
        """The best step so far; 0 is the base."""
        return self.steps[-1].best_step if self.steps else 0

    def score_of(self, step: int) -> Score:
        """Return the score of a step, or of the base for 0."""
        if step == 0:
            return self.base or Score()
        return self.steps[step - 1].current

    def save(self, out: Path) -> None:
        """Replace the file in ``out``; atomic and flushed."""
        write_text(out / STATE_FILE, self.model_dump_json(indent=1) + "\n")


def open_state(out: Path, fingerprint: Mapping[str, str]) -> State:
    """Return the state that ``out`` holds, or a new one.

    Raises:
        InputError: ``out`` holds something else, or another stream; the difference is named.
    """
    state = read_state(out)
    if state is None:
        return State(fingerprint=dict(fingerprint))
    difference = _difference(state.fingerprint, fingerprint)
    if difference:
        raise InputError(
            f"{out} holds another stream: {difference}; put it back, or give another OUT"
        )
    return state


def read_state(out: Path) -> State | None:
    """Return the state in ``out``, None where there is none yet.

    Raises:
        InputError: ``out`` is no directory or holds anything but a stream, or a damaged state.
    """
    if not out.exists():
        above = next(parent for parent in out.parents if parent.exists())
        if not above.is_dir():
            raise InputError(f"{out} cannot be made, for {above} is a file; give another OUT")
        return None
    if not out.is_dir():
        raise InputError(f"{out} is a file; name a directory for the stream")
    file = out / STATE_FILE
    if not file.is_file():
        ours = (f".{STATE_FILE}.", *BEFORE_STATE)
        others = [path.name for path in out.iterdir() if not path.name.startswith(ours)]
        if others:
            raise InputError(
                f"{out} exists and holds no stream (but {sorted(others)[0]}); nothing there will "
                "be replaced: give another OUT"
            )
        return None
    try:
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = document.get("format_version")
        if version != STATE_VERSION:
            raise InputError(
                f"{file}: format {version}, and this mergekit-arm reads {STATE_VERSION}: "
                "go on with the version that began it"
            )
        return State.model_validate(document)
    except (OSError, ValueError, ValidationError) as error:
        raise InputError(f"{file} is damaged ({type(error).__name__}); give another OUT") from error


def _difference(old: Mapping[str, str], new: Mapping[str, str]) -> str | None:
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if before is None:
            return f"{key} is new ({after})"
        if after is None:
            return f"{key} is gone ({before})"
        return f"{key} was {before} and is now {after}"
    return None
