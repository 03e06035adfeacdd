"""The stream's YAML file as checked models: mergekit's grammar for one step, and what repeats it.

A misspelt key, a value out of range and a key that belongs elsewhere are refused here; what the
values name (models, data, methods) is looked at in ``plan`` and ``data_checks``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from mergekit_arm.streaming.calibration import Calibration, Section
from mergekit_arm.streaming.rates import PerRun, Rates, Schedule, Search, read_rates

FINAL_DTYPES = ("bfloat16", "float16", "float32", "float64")
"""What the final model can be in."""

_ELSEWHERE = {
    "models": "a stream merges checkpoints step by step; list them under checkpoints",
    "slices": "a stream merges whole models; layers cannot be rearranged",
    "modules": "a stream merges whole models; modules cannot be rearranged",
    "out_dtype": "dtype is the final model's; every step is computed in float32",
}

_FLAG = re.compile(r"(?<!\S)--([a-z]+(?:-[a-z]+)*)")


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


class Compare(Section):
    """What is measured only to be looked at; no step depends on it."""

    checkpoints: bool = True
    """The score of every checkpoint as it is, before it is merged: one evaluation each."""
    average: bool = True
    """The score of the uniform average of the merged checkpoints: one merge and one evaluation."""
    angles: bool = True
    """How far each step goes and how far it turns: the three models are read once more."""


class StreamConfig(Section):
    """One stream. ``parameters``, ``tokenizer`` and ``chat_template`` are mergekit's own keys."""

    merge_method: str
    base_model: str
    checkpoints: str | list[str | list[str]]
    """A Trainer's directory, or models; a list of several in it are merged in one step."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    learning_rate: Any = None
    """Checked :data:`~mergekit_arm.streaming.rates.Rates`; None: the default."""
    passes: int = Field(default=1, ge=1)
    calibration: Calibration | None = None
    evaluation: Evaluation | None = None
    compare: Compare = Compare()
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
    def _read_learning_rate(cls, value: Any) -> Rates | None:
        # Decided by its form, so that a mistake is reported for the one that was meant.
        return None if value is None else read_rates(value)

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
    def _check_checkpoints(cls, value: str | list[str | list[str]]) -> Any:
        if not value or (isinstance(value, list) and not all(value)):
            raise ValueError("name a Trainer's output directory, or list model references")
        return value


class _UniqueKeys(yaml.SafeLoader):
    """Reads YAML in which no key stands twice: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                name = self.construct_object(key, deep=True)  # type: ignore[no-untyped-call]
                if name in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{name} stands twice", key.start_mark
                    )
                seen.add(name)
        return super().construct_mapping(node, deep)


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
        document = yaml.load(Path(source).read_text(encoding="utf-8"), _UniqueKeys)  # noqa: S506
    except OSError as error:
        raise InputError(f"{source}: {error.strerror}; name the stream's YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{source}: not YAML ({reason})") from error
    if not isinstance(document, Mapping):
        raise InputError(f"{source}: must be a mapping that starts with merge_method, base_model …")
    return _validate(dict(document), str(source))


@contextmanager
def section(name: str) -> Iterator[None]:
    """Put ``name`` before what is refused inside, and keys where ``calibrate`` has flags.

    Raises:
        InputError: the same, reworded.
    """
    try:
        yield
    except InputError as error:
        message = _FLAG.sub(lambda flag: flag[1].replace("-", "_"), error.message)
        raise InputError(f"{name}: {message}") from error


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
            "compare": Compare,
        }
        outer = place[0] if len(place) > 1 else ""
        known = models.get(outer, StreamConfig).model_fields
        if outer == "learning_rate":
            known = {**Schedule.model_fields, **Search.model_fields, **PerRun.model_fields}
        inside = f" in {outer}" if outer else ""
        return (
            f"unknown key {key!r}{inside}{did_you_mean(key, known)}; there are: {', '.join(known)}"
        )
    message = first["msg"].removeprefix("Value error, ")
    # The names of a union's branches say nothing to the user.
    path = ".".join(part for part in place if "[" not in part and part not in ("str", "int"))
    return f"{path}: {message[:1].lower()}{message[1:]}" if path else message
