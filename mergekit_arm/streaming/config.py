"""The stream's YAML file as checked models: mergekit's grammar for one step, and what repeats it.

A misspelt key, a value out of range and a key that belongs elsewhere are refused here; what the
values name (models, data, methods) is looked at in ``plan`` and ``forecast``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, field_validator, model_validator

from mergekit_arm.errors import InputError
from mergekit_arm.merging.documents import check_dtype
from mergekit_arm.sections import Section, read_checked
from mergekit_arm.streaming.calibration import Calibration
from mergekit_arm.streaming.rates import LineSearch, PerRun, Rates, Schedule, read_rates
from mergekit_arm.streaming.verdict import EVALUATION_KEYS, Evaluation

_ELSEWHERE = {
    "models": "a stream merges checkpoints step by step; list them under checkpoints",
    "slices": "a stream merges whole models; layers cannot be rearranged",
    "modules": "a stream merges whole models; modules cannot be rearranged",
    "out_dtype": "dtype is the final model's; every step is computed in float32",
}


class Compare(Section):
    """What is measured only to be looked at; no step depends on it."""

    checkpoints: bool = True
    """The scores of every checkpoint as it is, before it is merged: one evaluation each."""
    average: bool = True
    """The scores of the checkpoints' uniform average: one merge and one evaluation at the end."""
    commands: bool = False
    """Whether these get the numbers of commands as well, and not only their losses."""
    angles: bool = True
    """How far each step goes and turns: the weights of its models are read once more."""


class StreamConfig(Section):
    """One stream. ``parameters``, ``tokenizer`` and ``chat_template`` are mergekit's own keys."""

    merge_method: str
    base_model: str
    checkpoints: str | list[str | list[str]]
    """A Trainer's directory, or models; those in a list within the list are merged in one step."""
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
    _written: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def changes_tokens(self) -> bool:
        """Whether a merge may change which token an id means."""
        return self.tokenizer is not None or self.tokenizer_source is not None

    def document(self) -> dict[str, Any]:
        """Return the YAML again, as it was written; of the base model, what holds now."""
        return {**self._written, "base_model": self.base_model}

    @model_validator(mode="wrap")
    @classmethod
    def _remember(cls, given: Any, check: ModelWrapValidatorHandler[StreamConfig]) -> StreamConfig:
        checked = check(given)
        checked._written = dict(given)
        return checked

    @field_validator("learning_rate", mode="before")
    @classmethod
    def _read_learning_rate(cls, value: Any) -> Rates | None:
        # Decided by its form, so that a mistake is reported for the one that was meant.
        return None if value is None else read_rates(value)

    @field_validator("checkpoints")
    @classmethod
    def _check_checkpoints(cls, value: str | list[str | list[str]]) -> str | list[str | list[str]]:
        if not value or (isinstance(value, list) and not all(value)):
            raise ValueError("name a Trainer's output directory, or list model references")
        return value


_KEYS = {
    "": StreamConfig.model_fields,
    "compare": Compare.model_fields,
    "evaluation": EVALUATION_KEYS,
    "learning_rate": [key for one in (Schedule, LineSearch, PerRun) for key in one.model_fields],
}
"""What a section may hold, for messages."""


def load_config(
    source: StreamConfig | Mapping[str, Any] | str | Path, **changes: Any
) -> StreamConfig:
    """Return the checked configuration from a YAML file, a mapping, or itself.

    ``changes``: keys that hold in the place of those of the source.

    Raises:
        InputError: one line: the first thing that is wrong, where, and what to write instead.
    """
    written = source.document() if isinstance(source, StreamConfig) else source
    return read_checked(written, lambda document: _read({**document, **changes}), _KEYS)


def _read(document: dict[str, Any]) -> StreamConfig:
    for key, remedy in _ELSEWHERE.items():
        if key in document:
            raise InputError(f"{key}: {remedy}")
    config = StreamConfig.model_validate(document)
    check_dtype("dtype", config.dtype)
    return config
