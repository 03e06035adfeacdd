"""The stream's directory and what its steps share: where things lie, and which weights may go."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit.options import MergeOptions

from mergekit_arm.errors import Failure, InputError
from mergekit_arm.files import remove, scratch_at, write_text
from mergekit_arm.judging.judge import Judge, Scores
from mergekit_arm.merging.adapters import merge_adapter
from mergekit_arm.merging.options import LORA_CACHE
from mergekit_arm.models.tokenizer import load_own_tokenizer
from mergekit_arm.streaming.layout import (
    CHECKPOINT_STATISTICS,
    JOURNAL,
    MODEL,
    SCRATCH,
    STEP_STATISTICS,
    TASK_STATISTICS,
    step_folder,
)
from mergekit_arm.streaming.options import Keep
from mergekit_arm.streaming.plan.plan import StreamPlan
from mergekit_arm.streaming.state import State


@dataclass
class Workplace:
    """``OUT`` and everything that the steps share."""

    out: Path
    plan: StreamPlan
    merge: MergeOptions
    keep: Keep
    state: State
    judge: Judge | None
    say: Callable[[str], None]
    progress: Callable[[int, int], None] | None = None

    def borrow_template(self, references: Sequence[str]) -> str | None:
        """Return a checkpoint's chat template where the base has none, for all models to come."""
        trust = self.merge.trust_remote_code
        base = load_own_tokenizer(self.plan.config.base_model, trust)
        if self.plan.config.chat_template or base is None or base.chat_template:
            return None
        for reference in references:
            tokenizer = load_own_tokenizer(reference, trust)
            if tokenizer is not None and isinstance(tokenizer.chat_template, str):
                self.say(f"the base has no chat template: {reference}'s is used and published")
                return tokenizer.chat_template
        return None

    def folder(self, step: int) -> Path:
        """Return the directory of a step (from 1)."""
        return step_folder(self.out, step)

    def model_of(self, step: int) -> str:
        """Return the reference of the model after ``step``; 0 is the base."""
        return str(self.folder(step) / MODEL) if step else self.plan.config.base_model

    def needed(self, step: int) -> str:
        """Return :meth:`model_of` a step without whose weights the stream cannot go on.

        Raises:
            InputError: they are not there any more.
        """
        if not self.has(step):
            raise InputError(
                f"{self.out}: the float32 weights of step {step} are gone, with which the stream "
                "would go on; keep them with --keep last or --keep all"
            )
        return self.model_of(step)

    def has(self, step: int) -> bool:
        """Say whether a step's weights are there; the base's are."""
        return step == 0 or Path(self.model_of(step)).is_dir()

    @property
    def chosen(self) -> int:
        """The step that ``OUT/model`` is to be, by what is known so far."""
        evaluation = self.plan.config.evaluation
        best = evaluation is not None and evaluation.keep == "best"
        return self.state.best if best else self.state.current

    def score(self, reference: str, *, run_commands: bool = True) -> Scores:
        """Return how good a model is; empty without ``evaluation``.

        Raises:
            Failure: a loss that is not finite, or a command that fails or prints no number.
        """
        if self.judge is None:
            return {}
        model = merge_adapter(reference, self.merge)
        with scratch_at(self.out / SCRATCH) as scratch:
            found = self.judge.score(model, scratch, run_commands=run_commands)
        for name, score in found.items():
            if not math.isfinite(score):
                raise Failure(
                    f"{self.judge.place(name)}: the loss of {reference} is {score}: the model is "
                    "broken; try a lower learning_rate"
                )
        return found

    def score_aside(self, reference: str) -> Scores:
        """Return the scores of a model that is only looked at: no commands unless asked for."""
        return self.score(reference, run_commands=self.plan.config.compare.commands)

    def better(self, scores: Scores, other: Scores) -> bool:
        """Say whether ``scores`` are better than ``other``; without evaluation the later is."""
        evaluation = self.plan.config.evaluation
        return evaluation is None or evaluation.better(scores, other, self.state.base or {})

    def prune(self, *, finished: bool = False) -> None:
        """Remove weights and statistics that neither the next step nor the user needs.

        What an appended checkpoint would need stays: the last step's weights, unless ``keep``
        says best, and the statistics that its merge would read.
        """
        kept = {self.state.current, self.chosen}
        if self.keep == "all":
            kept = {record.step for record in self.state.steps if record.accepted}
        elif finished and self.keep == "best":
            kept = {self.chosen}
        for record in self.state.steps:
            folder = self.folder(record.step)
            if record.step not in kept:
                remove(folder / MODEL)
            for name in (STEP_STATISTICS, TASK_STATISTICS, CHECKPOINT_STATISTICS):
                remove(folder / f"{name}.partial")  # of a calibration killed at its very end
            if self.keep == "all":
                continue
            for path in folder.glob(f"{CHECKPOINT_STATISTICS}*"):
                remove(path)
            if record.step != self._serving():
                remove(folder / STEP_STATISTICS)
                remove(folder / TASK_STATISTICS)
        remove(self.out / LORA_CACHE)  # where the user names no other

    def _serving(self) -> int | None:
        """Return the step whose statistics the next one will read."""
        calibration, done = self.plan.calibration, self.state.steps[-1]
        if calibration is None or calibration.due(done.step + 1):
            return None
        return done.statistics_from

    def write_journal(self) -> None:
        """Write ``stream.jsonl`` anew: a line for every step, and for what was skipped."""
        lines = (f"{one.model_dump_json()}\n" for one in self.state.handled)
        write_text(self.out / JOURNAL, "".join(lines))
