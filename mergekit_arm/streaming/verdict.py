"""The section ``evaluation``: by what a step is judged, which of two is better, what follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from mergekit_arm.errors import InputError
from mergekit_arm.judging.judge import Scores
from mergekit_arm.judging.sets import DTYPE, EvaluationSet, HeldOutSet, read_sets
from mergekit_arm.sections import Section

LOSS, METRIC = "loss", "metric"
"""Names of the sets where the file gives none."""

_OF_DATA = tuple(HeldOutSet.model_fields)
METRIC_KEYS = {
    "metric_command": "metric_command",
    "metric_goal": "goal",
    "metric_timeout": "timeout",
}
SETS = "sets"
"""The field under which the checked sets stand; no key of the file."""


class Evaluation(Section):
    """How a step is judged, and what follows from it."""

    sets: dict[str, EvaluationSet]
    """By name, in the order of the file."""
    device: str = "auto"
    dtype: DTYPE = "auto"
    keep: Literal["best", "last"] = "best"
    patience: int | None = Field(default=None, ge=1)
    backtrack: bool = False
    _named: bool = PrivateAttr(default=True)

    @property
    def named(self) -> bool:
        """Whether the file names its sets."""
        return self._named

    @model_validator(mode="wrap")
    @classmethod
    def _remember(cls, given: Any, check: ModelWrapValidatorHandler[Evaluation]) -> Evaluation:
        checked = check(given)
        if isinstance(given, Mapping):
            checked._named = any(isinstance(value, Mapping) for value in given.values())
        return checked

    @model_validator(mode="before")
    @classmethod
    def _collect(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            raise ValueError("must be a mapping such as {dataset: ./heldout.jsonl}")
        rest = dict(given)
        own = {key: rest.pop(key) for key in _OWN if key in rest}
        data = {key: rest.pop(key) for key in _OF_DATA if key in rest}
        named = {key: rest.pop(key) for key in list(rest) if isinstance(rest[key], Mapping)}
        sets = {
            name: dict(one) if "metric_command" in one else {**data, **one}
            for name, one in named.items()
        } or _unnamed(data, rest)
        try:
            return {**own, **rest, SETS: read_sets(sets, "")}
        except InputError as error:
            place, _, said = error.message.removeprefix(".").partition(": ")
            # Without names that the file does not have.
            raise ValueError(said if place in (LOSS, METRIC) else f"{place}: {said}") from error

    @property
    def deciding(self) -> list[str]:
        """The sets whose scores decide which step is the best.

        A set with a bound only has to keep it, unless it says its weight. Where a file names no
        sets, the command decides if there is one.
        """
        if METRIC in self.sets and not self.named:
            return [METRIC]
        found = [
            name
            for name, one in self.sets.items()
            if one.at_most is None or "weight" in one.model_fields_set
        ]
        return found or list(self.sets)

    def standing(self, scores: Scores, base: Scores) -> tuple[bool, float] | None:
        """Return how good a model is beside the base, to be compared; None where it is not known.

        Whether it keeps every bound; and the sum over the deciding sets of weight · (how much
        better than the base), in nats for losses and in its own unit for a command.
        """
        if any(name not in scores or name not in base for name in self.sets):
            return None
        kept = all(
            one.at_most is None or scores[name] <= base[name] + one.at_most
            for name, one in self.sets.items()
        )
        return kept, self._gain(self.deciding, scores, base)

    def better(self, scores: Scores, other: Scores, base: Scores) -> bool:
        """Say whether ``scores`` are better than ``other``; equal is not."""
        one, two = self.standing(scores, base), self.standing(other, base)
        return one is not None and (two is None or one > two)

    def better_of(self, scores: Scores, other: Scores) -> bool:
        """Say whether a checkpoint's ``scores`` are better than ``other``, by the sets of both.

        Commands are not run for them, so that a loss decides where a command decides the steps.
        """
        names = [name for name in self.deciding if name in scores and name in other]
        return self._gain(names or [n for n in scores if n in other], scores, other) > 0

    def _gain(self, names: Iterable[str], scores: Scores, other: Scores) -> float:
        better = {"minimize": -1, "maximize": 1}
        changes = ((self.sets[name], scores[name] - other[name]) for name in names)
        return sum(one.weight * better[one.goal] * change for one, change in changes)


_OWN = [key for key in Evaluation.model_fields if key != SETS]
EVALUATION_KEYS = [*_OF_DATA, *METRIC_KEYS, *_OWN]
"""What the section may hold, where it names no sets."""


def _unnamed(data: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """Return the sets that are not named, and take what they are made of from ``rest``."""
    found = {} if data.get("dataset") is None else {LOSS: data}
    given = {field: rest.pop(key, None) for key, field in METRIC_KEYS.items()}
    metric = {field: value for field, value in given.items() if value is not None}
    if ("metric_command" in metric) != ("goal" in metric):
        raise ValueError("metric_command and metric_goal (minimize or maximize) belong together")
    if "metric_command" in metric:
        found[METRIC] = metric
    if not found:
        raise ValueError("needs a dataset, a metric_command, or both; or named sets of such")
    return found
