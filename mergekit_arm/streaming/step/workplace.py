"""The stream's directory and what its steps share: where things lie, and which weights may go."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergekit.options import MergeOptions

from mergekit_arm.files import fresh_directory, remove, write_text
from mergekit_arm.streaming.judge import Score, StepJudge
from mergekit_arm.streaming.layout import (
    CHECKPOINT_STATISTICS,
    JOURNAL,
    MODEL,
    SCRATCH,
    STEP_STATISTICS,
    STEPS,
    TASK_STATISTICS,
)
from mergekit_arm.streaming.options import Keep
from mergekit_arm.streaming.plan.plan import StreamPlan
from mergekit_arm.streaming.state import State
from mergekit_arm.streaming.step.merge import merge_adapter


@dataclass
class Workplace:
    """``OUT`` and everything that the steps share."""

    out: Path
    plan: StreamPlan
    merge: MergeOptions
    keep: Keep
    state: State
    judge: StepJudge | None
    say: Callable[[str], None]
    progress: Callable[[int, int], None] | None = None

    def folder(self, step: int) -> Path:
        """Return the directory of a step (from 1)."""
        return self.out / STEPS / f"{step:03d}"

    def model_of(self, step: int) -> str:
        """Return the reference of the model after ``step``; 0 is the base."""
        return str(self.folder(step) / MODEL) if step else self.plan.config.base_model

    @property
    def chosen(self) -> int:
        """The step that ``OUT/model`` is to be, by what is known so far."""
        evaluation = self.plan.config.evaluation
        best = evaluation is not None and evaluation.keep == "best"
        return self.state.best if best else self.state.current

    def score(self, reference: str, *, run_command: bool = True) -> Score:
        """Return how good a model is; all None without ``evaluation``."""
        if self.judge is None:
            return Score()
        model = merge_adapter(reference, self.merge)
        scratch = fresh_directory(self.out / SCRATCH)
        try:
            return self.judge.score(model, scratch, run_command=run_command)
        finally:
            remove(scratch)

    def prune(self, *, finished: bool = False) -> None:
        """Remove weights and statistics that neither the next step nor the user needs.

        ``finished``: the final model is there, so that nothing is kept to make it from.
        """
        running = self.state.stopped is None
        if self.keep == "all":
            kept = {record.step for record in self.state.steps if record.accepted}
        elif running:
            kept = {self.state.current, self.chosen}
        else:
            kept = {self.chosen if self.keep == "best" else self.state.current}
        if not finished:
            kept.add(self.chosen)  # the final model is made from it
        newest = len(self.state.steps)
        for record in self.state.steps:
            folder = self.folder(record.step)
            if record.step not in kept:
                remove(folder / MODEL)
            for name in (STEP_STATISTICS, TASK_STATISTICS, CHECKPOINT_STATISTICS):
                remove(folder / f"{name}.partial")  # of a calibration killed at its very end
            if self.keep == "all":
                continue
            if record.step < newest or not running:
                remove(folder / STEP_STATISTICS)
                remove(folder / TASK_STATISTICS)
            remove(folder / CHECKPOINT_STATISTICS)

    def write_journal(self) -> None:
        """Write ``stream.jsonl`` anew from the state."""
        lines = (json.dumps(record.model_dump(mode="json")) for record in self.state.steps)
        write_text(self.out / JOURNAL, "".join(f"{line}\n" for line in lines))
