"""Named evaluation sets, as YAML files write them: held-out data, or a command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from mergekit_arm.errors import InputError
from mergekit_arm.sections import Section, explain

Goal = Literal["minimize", "maximize"]
DTYPE = Literal["auto", "float32", "bfloat16", "float16"]


class HeldOutSet(Section):
    """Held-out data: a model's score is its mean loss on it, in nats per token."""

    dataset: str
    subset: str | None = None
    split: str | None = None
    text_column: str | None = None
    samples: int = Field(default=256, ge=1)
    sequence_length: int = Field(default=512, ge=2)
    batch_size: int | None = Field(default=None, ge=1)
    seed: int = Field(default=42, ge=0)
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of this set beside the others."""
    at_most: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Of a stream: how much the loss may rise over the base's, in nats."""

    @property
    def goal(self) -> Goal:
        """Losses are to be small."""
        return "minimize"


class MetricSet(Section):
    """A command of the user's: a model's score is the number that it prints last."""

    metric_command: str
    """``{model}`` is the model's directory, ``{scratch}`` an empty one."""
    goal: Goal
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds after which the command counts as failed."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    @property
    def at_most(self) -> None:
        """Numbers of commands have no bound."""

    @model_validator(mode="after")
    def _names_the_model(self) -> MetricSet:
        if "{model}" not in self.metric_command:
            raise ValueError("metric_command must say where the model goes: {model}")
        return self


EvaluationSet = HeldOutSet | MetricSet


def read_sets(given: Any, where: str) -> dict[str, EvaluationSet]:
    """Return the named sets of ``given``; ``where`` it stands is for messages.

    Raises:
        InputError: it is no mapping of names to sets, or a set is wrong.
    """
    form = "{NAME: {dataset: ./heldout.jsonl}}"
    if not isinstance(given, Mapping) or not given:
        raise InputError(f"{where}: must be named sets such as {form}")
    return {str(name): _read_set(one, f"{where}.{name}") for name, one in given.items()}


def _read_set(given: Any, where: str) -> EvaluationSet:
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: must be a set such as {{dataset: ./heldout.jsonl}}")
    kinds = [key for key in ("dataset", "metric_command") if key in given]
    if len(kinds) != 1:
        raise InputError(f"{where}: a set has either a dataset or a metric_command")
    kind = HeldOutSet if kinds == ["dataset"] else MetricSet
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, {'': kind.model_fields})}") from error


def better(goal: Goal, one: float, other: float) -> bool:
    """Say whether score ``one`` is better than ``other``; equal is not."""
    return one < other if goal == "minimize" else one > other
