"""The section ``calibration`` of a stream's YAML file: what is measured, and how often."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.settings import checked_settings
from mergekit_arm.sections import Section

_TEXTS = ("general", "task")


class Calibration(Section):
    """What is measured, and how often: every field of ``mergekit-arm calibrate`` that applies."""

    refresh: Literal["once", "every"] | int = "once"
    settings: dict[str, Any] = Field(default_factory=dict)
    """Checked fields of :class:`CalibrationOptions`, defaults filled in."""
    task: dict[str, Any] | None = None
    """The same for the task's text, where ``settings`` are for general text beside it."""
    written: frozenset[str] = frozenset()
    """Which of ``settings`` stand in the file, be it with their defaults."""

    @model_validator(mode="before")
    @classmethod
    def _collect(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            raise ValueError("must be a mapping such as {dataset: ./calibration.jsonl}")
        shared = dict(given)
        refresh = {"refresh": shared.pop("refresh", "once")}
        texts = [shared.pop(key) for key in _TEXTS if key in shared]
        if not texts:
            return {**refresh, "settings": _checked(shared), "written": frozenset(shared)}
        if len(texts) == 1 or not all(isinstance(one, Mapping) for one in texts):
            raise ValueError(
                "general and task belong together, each a mapping such as {dataset: ./task.jsonl}"
            )
        general, task = ({**shared, **text} for text in texts)
        if "dataset" not in general or "dataset" not in task:
            raise ValueError("general and task each need a dataset")
        checked = {"settings": _checked(general), "task": _checked(task)}
        return {**refresh, **checked, "written": frozenset(general)}

    @field_validator("refresh", mode="before")
    @classmethod
    def _check_refresh(cls, value: Any) -> Any:
        steps = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not steps and value not in ("once", "every"):
            raise ValueError(f"must be once, every, or N for every Nth step, not {value!r}")
        return value

    def chosen(self) -> list[dict[str, Any]]:
        """Return what :meth:`passes` does, without the defaults of ``calibrate``."""
        defaults = vars(CalibrationOptions(model="", out=""))
        return [{k: v for k, v in one.items() if v != defaults[k]} for one in self.passes()]

    def passes(self) -> list[dict[str, Any]]:
        """Return the settings of each pass over the model: general text's, then the task's."""
        return [self.settings] if self.task is None else [self.settings, self.task]

    def due(self, step: int) -> bool:
        """Say whether the model is measured afresh before step ``step`` (from 1)."""
        if self.refresh == "once":
            return step == 1
        every = 1 if self.refresh == "every" else int(self.refresh)
        return (step - 1) % every == 0


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    return checked_settings(given, decided=("statistics",), beside=("refresh", *_TEXTS))
