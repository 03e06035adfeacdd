"""The stream's YAML file as checked models: mergekit's grammar for one step, and what repeats it.

A misspelt key, a value out of range and a key that belongs elsewhere are refused here; what the
values name (models, data, methods) is looked at in ``plan`` and ``data_checks``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from mergekit_arm.errors import InputError, did_you_mean
from mergekit_arm.judging.sets import EvaluationSet, HeldOutSet, MetricSet
from mergekit_arm.sections import Section
from mergekit_arm.streaming.calibration import Calibration

FINAL_DTYPES = ("bfloat16", "float16", "float32", "float64")
"""What the final model can be in."""

DATA, METRIC = "", "metric"
"""Names of a stream's evaluation sets; the first has none, for the section itself is it."""

DEFAULT_LEARNING_RATE = 0.5
HIGHEST_LEARNING_RATE = 2.0

_ELSEWHERE = {
    "models": "a stream merges one checkpoint a step; list them under checkpoints",
    "slices": "a stream merges whole models; layers cannot be rearranged",
    "modules": "a stream merges whole models; modules cannot be rearranged",
    "out_dtype": "dtype is the final model's; every step is computed in float32",
}


class Schedule(Section):
    """Learning rates from a rule; see :func:`~mergekit_arm.streaming.plan.schedule.rate_at`."""

    schedule: Literal["constant", "linear", "cosine"]
    peak: float = Field(gt=0, le=HIGHEST_LEARNING_RATE)
    final: float | None = Field(default=None, gt=0, le=HIGHEST_LEARNING_RATE)
    warmup: int = Field(default=0, ge=0)
    steps: int | None = Field(default=None, ge=1)
    """Length of the rule; needed where the number of steps is not known (``--watch``)."""


class Evaluation(Section):
    """How a step is judged, and what follows from it."""

    dataset: str | None = None
    subset: str | None = None
    split: str | None = None
    text_column: str | None = None
    samples: int = Field(default=256, ge=1)
    sequence_length: int = Field(default=512, ge=2)
    batch_size: int | None = Field(default=None, ge=1)
    seed: int = Field(default=42, ge=0)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    keep: Literal["best", "last"] = "best"
    patience: int | None = Field(default=None, ge=1)
    backtrack: bool = False
    metric_command: str | None = None
    metric_goal: Literal["minimize", "maximize"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Evaluation:
        if self.dataset is None and self.metric_command is None:
            raise ValueError("needs a dataset, a metric_command, or both")
        if (self.metric_command is None) != (self.metric_goal is None):
            raise ValueError(
                "metric_command and metric_goal (minimize or maximize) belong together"
            )
        if self.metric_command is not None and "{model}" not in self.metric_command:
            raise ValueError("metric_command must say where the model goes: {model}")
        return self

    def sets(self) -> dict[str, EvaluationSet]:
        """Return what models are scored on: ``DATA``, ``METRIC`` or both."""
        found: dict[str, EvaluationSet] = {}
        if self.dataset is not None:
            shared = HeldOutSet.model_fields.keys() & Evaluation.model_fields.keys()
            found[DATA] = HeldOutSet(**{name: getattr(self, name) for name in shared})
        if self.metric_command is not None:
            assert self.metric_goal is not None
            found[METRIC] = MetricSet(metric_command=self.metric_command, goal=self.metric_goal)
        return found


class StreamConfig(Section):
    """One stream. ``parameters``, ``tokenizer`` and ``chat_template`` are mergekit's own keys."""

    merge_method: str
    base_model: str
    checkpoints: str | list[str]
    parameters: dict[str, Any] = Field(default_factory=dict)
    learning_rate: float | list[float] | Schedule | None = None
    passes: int = Field(default=1, ge=1)
    calibration: Calibration | None = None
    evaluation: Evaluation | None = None
    dtype: str | None = None
    """Of the final model; none: as the base model's configuration says."""
    tokenizer_source: str | None = None
    tokenizer: dict[str, Any] | None = None
    chat_template: str | None = None

    @property
    def changes_tokens(self) -> bool:
        """Whether a merge may change which token an id means."""
        return self.tokenizer is not None or self.tokenizer_source is not None

    def document(self) -> dict[str, Any]:
        """Return the YAML again, without defaults."""
        document = self.model_dump(mode="json", exclude_defaults=True)
        if self.calibration is not None:
            document["calibration"] = self.calibration.document()
        return document

    @field_validator("learning_rate", mode="before")
    @classmethod
    def _read_learning_rate(cls, value: Any) -> Any:
        # Decided here, so that a mistake is reported for the form that was meant.
        if isinstance(value, Mapping):
            return Schedule.model_validate(value)
        rates = value if isinstance(value, list) else [value]
        if value is None or isinstance(value, Schedule):
            return value
        for rate in rates:
            try:
                fits = not isinstance(rate, bool) and 0 < float(rate) <= HIGHEST_LEARNING_RATE
            except (TypeError, ValueError):
                fits = False
            if not fits:
                raise ValueError(
                    f"must lie in (0, {HIGHEST_LEARNING_RATE:g}], not {rate!r}; "
                    "or be a list of such, or {schedule: cosine, peak: 0.6, final: 0.1}"
                )
        return value

    @field_validator("dtype")
    @classmethod
    def _check_dtype(cls, value: str | None) -> str | None:
        if value is not None and value not in FINAL_DTYPES:
            raise ValueError(
                f"{value!r} is none of {', '.join(FINAL_DTYPES)}{did_you_mean(value, FINAL_DTYPES)}"
            )
        return value

    @field_validator("checkpoints")
    @classmethod
    def _check_checkpoints(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("name a Trainer's output directory, or list model references")
        return value


def load_config(source: StreamConfig | Mapping[str, Any] | str | Path) -> StreamConfig:
    """Return the checked configuration from a YAML file, a mapping, or itself.

    Raises:
        InputError: one line: the first thing that is wrong, where, and what to write instead.
    """
    if isinstance(source, StreamConfig):
        return source
    if isinstance(source, Mapping):
        return _validate(dict(source), "stream configuration")
    try:
        document = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{source}: {error.strerror}; name the stream's YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{source}: not YAML ({reason})") from error
    if not isinstance(document, Mapping):
        raise InputError(f"{source}: must be a mapping that starts with merge_method, base_model …")
    return _validate(dict(document), str(source))


def _validate(document: dict[str, Any], where: str) -> StreamConfig:
    for key, remedy in _ELSEWHERE.items():
        if key in document:
            raise InputError(f"{where}: {key}: {remedy}")
    try:
        return StreamConfig.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{where}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    errors = error.errors()
    # A misspelt key also leaves the right one missing: name the cause.
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    place = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        key = place[-1]
        models: dict[str, type[BaseModel]] = {
            "evaluation": Evaluation,
            "learning_rate": Schedule,
        }
        outer = place[0] if len(place) > 1 else ""
        known = models.get(outer, StreamConfig).model_fields
        inside = f" in {outer}" if outer else ""
        return (
            f"unknown key {key!r}{inside}{did_you_mean(key, known)}; there are: {', '.join(known)}"
        )
    message = first["msg"].removeprefix("Value error, ")
    # The names of a union's branches say nothing to the user.
    path = ".".join(part for part in place if "[" not in part and part not in ("str", "int"))
    return f"{path}: {message[:1].lower()}{message[1:]}" if path else message
