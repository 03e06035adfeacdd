"""How good a step's model is: its loss on held-out tokens, a number from a command, or both."""

from __future__ import annotations

import math
from pathlib import Path

import click
from mergekit.options import MergeOptions
from pydantic import BaseModel, ConfigDict

from mergekit_arm.errors import Failure
from mergekit_arm.judging.heldout import HeldOut
from mergekit_arm.judging.judge import Judge
from mergekit_arm.judging.sets import better
from mergekit_arm.streaming.config import DATA, METRIC, Evaluation
from mergekit_arm.streaming.layout import METRIC_LOG


class Score(BaseModel):
    """One model's result, as the state stores it; what was not asked for is None."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss: float | None = None
    """Mean negative log-likelihood in nats over the scored tokens."""
    perplexity: float | None = None
    """exp(loss)."""
    metric: float | None = None
    """What the user's command said."""

    def better_than(self, other: Score, settings: Evaluation) -> bool:
        """Say whether this decides for itself against ``other``; equal is not better."""
        if settings.metric_goal is None:
            assert self.loss is not None
            assert other.loss is not None
            return better("minimize", self.loss, other.loss)
        assert self.metric is not None
        assert other.metric is not None
        return better(settings.metric_goal, self.metric, other.metric)


class StepJudge:
    """Scores models on the same held-out tokens; the data is read when it is first needed."""

    def __init__(
        self,
        settings: Evaluation,
        references: list[str],
        merge: MergeOptions,
        *,
        changes_tokens: bool = False,
    ) -> None:
        """``references``: the base, then models whose chat template may stand in for its own.

        ``changes_tokens``: the merges change the tokenizer, so that ids must be compared.
        """
        self.settings = settings
        self._judge = Judge(
            settings.sets(),
            list(references),
            merge,
            settings.device,
            settings.dtype,
            changes_tokens,
            say=_show if merge.verbosity > 0 else None,
        )

    def add_reference(self, reference: str) -> None:
        """Add a model whose chat template may be used, if the data was not read yet."""
        self._judge.add_reference(reference)

    @property
    def heldout(self) -> HeldOut:
        """The tokenised data.

        Raises:
            InputError: it cannot be used.
        """
        return self._judge.heldout(DATA)

    def score(self, reference: str, scratch: Path, *, run_command: bool = True) -> Score:
        """Score a model without adapter.

        What a command prints is in ``metric.log`` beside ``scratch``.
        ``run_command`` false leaves out the user's, for models that only lend their loss. Loads
        the model for the loss and frees it before the command starts.

        Raises:
            Failure: a loss that is not finite, or a command that fails or prints no number.
        """
        if self.settings.metric_command is not None:
            self._judge.log = scratch.with_name(METRIC_LOG)
        found = self._judge.score(reference, scratch, run_commands=run_command)
        loss = found.get(DATA)
        if loss is None:
            return Score(metric=found.get(METRIC))
        if not math.isfinite(loss):
            raise Failure(
                f"the loss of {reference} on {self.settings.dataset} is {loss}: "
                "the model is broken; try a lower learning_rate"
            )
        return Score(loss=loss, perplexity=_exp(loss), metric=found.get(METRIC))


def _show(line: str) -> None:
    click.echo(line, err=True)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
