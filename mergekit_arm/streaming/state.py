"""What a stream knows of itself on the disk: one file, replaced whole after every step.

A step counts once its record is in this file; what a killed stream had begun beyond it is
done again, or found finished and used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from mergekit_arm.files import write_text
from mergekit_arm.judging.judge import Scores
from mergekit_arm.outputs import holds, read_saved
from mergekit_arm.streaming.layout import BEFORE_STATE, STATE_FILE


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MergedCheckpoint(_Record):
    """One of the checkpoints that a step merged."""

    name: str
    reference: str
    content: str | None
    """By which it is recognised; see :func:`~mergekit_arm.models.contents.describe`."""
    scores: Scores = {}
    """As it was, before it was merged."""


class Attempt(_Record):
    """One merge of a step, judged."""

    rates: list[Any] | None
    """Of each checkpoint; None where the method has no learning rate."""
    scores: Scores
    bytes: int
    """Of the weights that it wrote."""


class Move(_Record):
    """How far a step went, by norms over all weights; None where it went nowhere, or unmeasured."""

    update_norm: float | None = None
    task_norm: float | None = None
    """How far the checkpoint was, or the mean of several."""
    rotation_degrees: dict[str, float] | None = None
    """Mean and largest angle between update and task vector, over the matrices that moved."""


class StepRecord(Move):
    """One step: a line of ``stream.jsonl``."""

    step: int
    """From 1."""
    position: int
    """Which of the checkpoints it merged, from 0, those counted that were skipped."""
    passed: int
    """Which pass over the checkpoints, from 1."""
    checkpoint: str
    """Names of those merged."""
    merged: list[MergedCheckpoint]
    learning_rate: Any
    """With which the step was made, or a list of each checkpoint's; None without one."""
    planned: Any
    """What the configuration said of the learning rate."""
    tried: list[Attempt]
    """All merges that were judged, the one that was taken among them."""
    accepted: bool
    """False where every attempt made the model worse: it stayed as it was."""
    statistics_from: int | None
    """The step whose starting model was measured."""
    calibration_tokens: int
    """Measured in this step; 0 where earlier statistics served."""
    current: Scores
    base: Scores
    best_step: int
    """Up to here; 0 is the base."""
    seconds: dict[str, float]
    bytes: int
    """Of the weights that the step wrote, all attempts together."""


class Skipped(_Record):
    """Checkpoints that could not be merged."""

    position: int
    checkpoint: str
    reason: str


class AverageScores(_Record):
    """The uniform average of the checkpoints that were merged, beside which the stream is seen."""

    steps: int
    """How many steps' checkpoints are in it."""
    scores: Scores = {}
    missing: str | None = None
    """Why it has no score."""


class State(_Record):
    """All of ``stream_state.json``."""

    format_version: int = 3
    fingerprint: dict[str, str]
    """What every step depends on."""
    judge: dict[str, str] = {}
    """What every score depends on."""
    data: dict[str, dict[str, Any]] = {}
    """Of every evaluation set with data: its hash and how many tokens are scored."""
    chat_template: str | None = None
    """A checkpoint's, where the base has none."""
    base: Scores | None = None
    """None until the base was scored."""
    steps: list[StepRecord] = []
    skipped: list[Skipped] = []
    tried: list[Attempt] = []
    """Of the step that is being made."""
    making: str = ""
    """Which step that is, of which checkpoints, at which rates: ``tried`` is of nothing else."""
    average: AverageScores | None = None
    last: int | None = None
    """The number of the run's last checkpoint, once that is known of one that was followed."""
    stopped: str | None = None
    """Why the stream ended; None while it runs."""
    chosen: int | None = None
    """The step that ``model`` is, once it is there."""
    final: str | None = None
    """How ``model`` was made of that step."""

    @property
    def position(self) -> int:
        """How many entries of the list of checkpoints are behind the stream."""
        return len(self.steps) + len(self.skipped)

    @property
    def handled(self) -> list[StepRecord | Skipped]:
        """Return these entries in order."""
        return sorted([*self.steps, *self.skipped], key=lambda one: one.position)

    @property
    def current(self) -> int:
        """The last accepted step; 0 is the base."""
        return self.before(len(self.steps) + 1)

    def before(self, step: int) -> int:
        """Return the step whose model ``step`` started from; 0 is the base."""
        earlier = reversed(self.steps[: step - 1])
        return next((record.step for record in earlier if record.accepted), 0)

    @property
    def best(self) -> int:
        """The best step so far; 0 is the base."""
        return self.steps[-1].best_step if self.steps else 0

    def scores_of(self, step: int) -> Scores:
        """Return the scores of a step, or of the base for 0."""
        return (self.base or {}) if step == 0 else self.steps[step - 1].current

    def save(self, out: Path) -> None:
        """Replace the file in ``out``; atomic and flushed."""
        write_text(out / STATE_FILE, self.model_dump_json(indent=1) + "\n")


def read_state(out: Path) -> State | None:
    """Return the state in ``out``, None where there is none yet.

    Raises:
        InputError: ``out`` is no directory or holds anything but a stream, or a damaged state.
    """
    there = holds(out, "stream", STATE_FILE, BEFORE_STATE)
    return read_saved(out / STATE_FILE, State) if there else None
