"""The file that ``tune`` reads: a mergekit configuration, and the section ``tuning`` beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from mergekit_arm.errors import InputError
from mergekit_arm.judging.sets import DTYPE, EvaluationSet, MetricSet, read_sets
from mergekit_arm.merging.keys import refuse_unread
from mergekit_arm.sections import Section, explain, read_checked
from mergekit_arm.tuning.space import SPACE_KEYS, Space, find_space
from mergekit_arm.units import parse_duration

SECTION = "tuning"
CALIBRATION = "calibration"
"""A section that mergekit passes over as well: the data of the statistics."""
SAMPLERS = ("tpe", "random", "grid", "cmaes")
Sampler = Literal["tpe", "random", "grid", "cmaes"]
BASELINE_WEIGHTS = (0.3, 0.5, 0.7, 1.0)


class TuningSettings(Section):
    """The section ``tuning`` without its sets, which are read apart."""

    objective: Literal["mean", "pareto"] = "mean"
    trials: int = Field(default=40, ge=1, le=1_000_000)
    timeout: float | None = Field(default=None, gt=0)
    """Seconds after which no trial begins."""
    sampler: Sampler = "tpe"
    seed: int = Field(default=42, ge=0, lt=1 << 32)
    baseline: bool = True
    """Whether plain task arithmetic is tried as well."""
    pruning: bool = True
    """Whether a bad trial ends after a share of the data."""
    dtype: DTYPE = "auto"
    """Of the forward passes."""

    @field_validator("timeout", mode="before")
    @classmethod
    def _read_timeout(cls, value: Any) -> Any:
        return parse_duration(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class TuneConfig:
    """One search, as its file says it."""

    space: Space
    """Of the merge configuration alone."""
    settings: TuningSettings
    evaluation: Mapping[str, EvaluationSet]
    test: Mapping[str, EvaluationSet]
    """Empty where nothing is kept for the end."""
    calibration: Mapping[str, Any]


def load_tuning(source: Mapping[str, Any] | str | Path) -> TuneConfig:
    """Return the checked configuration from a YAML file or its content.

    Raises:
        InputError: one line: the first thing that is wrong, where, and what to write instead.
    """
    return read_checked(source, _read, {})


def _read(document: dict[str, Any]) -> TuneConfig:
    section = document.pop(SECTION, None)
    if not isinstance(section, Mapping):
        raise InputError(
            f"there is no section {SECTION}: add {SECTION}: {{evaluation: {{NAME: "
            "{dataset: ./heldout.jsonl}}}"
        )
    calibration = document.pop(CALIBRATION, {})
    rest = dict(section)
    evaluation = read_sets(rest.pop("evaluation", None), f"{SECTION}.evaluation")
    test = read_sets(rest.pop("test"), f"{SECTION}.test") if "test" in rest else {}
    try:
        settings = TuningSettings.model_validate(rest)
    except ValidationError as error:
        raise InputError(f"{SECTION}: {explain(error, {'': _AllKeys.model_fields})}") from error
    for name, one in (evaluation | test).items():
        if one.at_most is not None:
            raise InputError(f"{SECTION}: {name}: at_most is for streams; give the set a weight")
    if settings.objective == "pareto" and len(evaluation) < 2:
        raise InputError(f"{SECTION}.objective: pareto needs two evaluation sets or more")
    _check_test(evaluation, test)
    space = find_space(document)
    refuse_unread(document, passed_over=SPACE_KEYS)
    return TuneConfig(
        space,
        settings,
        evaluation,
        test,
        calibration if isinstance(calibration, Mapping) else {},
    )


class _AllKeys(TuningSettings):
    evaluation: Any = None
    test: Any = None


def _check_test(evaluation: Mapping[str, EvaluationSet], test: Mapping[str, EvaluationSet]) -> None:
    """Refuse a test that the search has seen."""
    for name, one in test.items():
        for other, searched in evaluation.items():
            if _what(one) == _what(searched):
                raise InputError(
                    f"{SECTION}.test.{name} is what {SECTION}.evaluation.{other} searches on: a "
                    "test needs data of its own"
                )


def _what(one: EvaluationSet) -> tuple[str | None, ...]:
    if isinstance(one, MetricSet):
        return (one.metric_command,)
    return one.dataset, one.subset, one.split
