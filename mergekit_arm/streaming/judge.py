"""Scores the models of a stream, and says what it scored them on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mergekit.options import MergeOptions

from mergekit_arm.errors import Failure
from mergekit_arm.judging.judge import Judge, Scores
from mergekit_arm.judging.loss import OnShare
from mergekit_arm.judging.sets import HeldOutSet
from mergekit_arm.streaming.layout import METRIC_LOG
from mergekit_arm.streaming.plan.plan import StreamPlan, content_of
from mergekit_arm.streaming.verdict import LOSS, METRIC, Evaluation

Progress = Callable[[str, int, int], None]
"""Told what goes on, how much of it is done, and how much there is."""


class StreamJudge:
    """Scores models on the same held-out tokens; the data is read when it is first needed."""

    def __init__(
        self,
        settings: Evaluation,
        references: list[str],
        merge: MergeOptions,
        *,
        changes_tokens: bool = False,
        say: Callable[[str], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """``references``: the base, then models whose chat template may stand in for its own.

        ``changes_tokens``: the merges change the tokenizer, so that ids must be compared.
        ``say``: receives what a metric command prints.
        """
        self.settings = settings
        self._progress = progress
        named = not set(settings.sets) <= {LOSS, METRIC}
        self._judge = Judge(
            settings.sets,
            list(references),
            merge,
            settings.device,
            settings.dtype,
            changes_tokens,
            say=say,
            on_share=self._shares if progress is not None else None,
        )
        if not named:
            self._judge.place = lambda name: "evaluation"  # type: ignore[method-assign]

    def add_reference(self, reference: str) -> None:
        """Add a model whose chat template may be used, if the data was not read yet."""
        self._judge.add_reference(reference)

    def read_data(self) -> dict[str, dict[str, Any]]:
        """Return of every set with data a hash of what is scored, and how many tokens that is.

        Raises:
            InputError: it cannot be used.
        """
        found = {}
        for name, one in self.settings.sets.items():
            if isinstance(one, HeldOutSet):
                held = self._judge.heldout(name)
                digest = hashlib.sha256()
                for sequence in held.sequences:
                    digest.update(sequence.ids.numpy().tobytes())
                    digest.update(sequence.scored.numpy().tobytes())
                found[name] = {"sha256": digest.hexdigest(), "tokens": held.scored_tokens}
        return found

    def score(self, reference: str, scratch: Path, *, run_commands: bool = True) -> Scores:
        """Score a model without adapter.

        What a command prints is in ``metric.log`` beside ``scratch``. ``run_commands`` false
        leaves out the user's, for models that only lend their loss.

        Raises:
            Failure: a loss that is not finite, or a command that fails or prints no number.
        """
        if self._judge.has_commands:
            self._judge.log = scratch.with_name(METRIC_LOG)
        found = self._judge.score(reference, scratch, run_commands=run_commands)
        for name, score in found.items():
            if not math.isfinite(score):
                data = getattr(self.settings.sets[name], "dataset", name)
                raise Failure(
                    f"the loss of {reference} on {data} is {score}: the model is broken; "
                    "try a lower learning_rate"
                )
        return found

    def _shares(self, name: str) -> OnShare:
        def share(done: int, total: int, _: float) -> None:
            if self._progress is not None:
                self._progress("Evaluating" if name == LOSS else f"Evaluating {name}", done, total)

        return share


def judged_by(plan: StreamPlan) -> dict[str, str]:
    """Return what every score of a stream depends on."""
    evaluation = plan.config.evaluation
    if evaluation is None:
        return {}
    found = {"device and dtype": f"{evaluation.device} {evaluation.dtype}"}
    for name, one in evaluation.sets.items():
        left_out = {"weight", "at_most", "batch_size", "goal", "timeout"}
        found[name] = json.dumps(one.model_dump(mode="json", exclude=left_out), sort_keys=True)
        content = content_of(getattr(one, "dataset", None))
        if content:
            found[f"content of the {name} data"] = content
    return found


def make_judge(
    plan: StreamPlan,
    merge: MergeOptions,
    further: Sequence[str] = (),
    *,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> StreamJudge | None:
    """Return what scores the stream's models, None without ``evaluation``.

    ``further``: models whose chat template may stand in for the base's, before the checkpoints.
    """
    if plan.config.evaluation is None:
        return None
    first = [one.reference for one in (plan.checkpoints or [()])[0]]
    return StreamJudge(
        plan.config.evaluation,
        [plan.config.base_model, *further, *first],
        merge,
        changes_tokens=plan.config.changes_tokens,
        say=say,
        progress=progress,
    )
