"""Learning rates: one number, mergekit's filters, one a step, one a run, a rule, or a search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from mergekit_arm.errors import InputError
from mergekit_arm.sections import Section

DEFAULT_LEARNING_RATE = 0.5
HIGHEST_LEARNING_RATE = 2.0

Rate = float | list[dict[str, Any]]
"""Of one model at one step: a number, or mergekit's list of ``{filter, value}``."""

_FORMS = (
    "or be a list of such, [{filter: mlp, value: 0.3}, {value: 0.5}], "
    "{schedule: cosine, peak: 0.6, final: 0.1}, {search: [0.25, 0.5, 1.0]} or {runs: [0.5, 0.3]}"
)


class Schedule(Section):
    """Learning rates from a rule; see :func:`rule_at`."""

    schedule: Literal["constant", "linear", "cosine"]
    peak: float = Field(gt=0, le=HIGHEST_LEARNING_RATE)
    final: float | None = Field(default=None, gt=0, le=HIGHEST_LEARNING_RATE)
    warmup: int = Field(default=0, ge=0)
    steps: int | None = Field(default=None, ge=1)
    """Length of the rule; needed where the number of steps is not known (``--watch``)."""


class LineSearch(Section):
    """Several rates, of which each step takes the best on the held-out data, or none of them."""

    search: list[float] = Field(min_length=1)

    @field_validator("search", mode="before")
    @classmethod
    def _check(cls, value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError("must be a list such as [0.25, 0.5, 1.0]")
        found = [_number(one) for one in value if one != 0]  # 0, no step, is always tried
        return list(dict.fromkeys(found))


class PerRun(Section):
    """A rate, or a rule, for each of the runs whose checkpoints one step merges."""

    runs: list[Any] = Field(min_length=1)

    @field_validator("runs", mode="before")
    @classmethod
    def _check(cls, value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError("must be a list with a rate for each run")
        return [_rule(one) for one in value]


Rates = Rate | Schedule | LineSearch | PerRun | list[Any]


def read_rates(value: Any) -> Rates:
    """Return the checked rates that a file's ``learning_rate`` means.

    Raises:
        ValueError: it has none of the forms, or a number out of range.
    """
    if isinstance(value, Mapping) and "search" in value:
        return LineSearch.model_validate(value)
    if isinstance(value, Mapping) and "runs" in value:
        return PerRun.model_validate(value)
    if isinstance(value, list) and value and not _is_filters(value):
        return [
            [_rate(run) for run in one] if isinstance(one, list) and not _is_filters(one)
            else _rate(one)
            for one in value
        ]  # fmt: skip
    return value if isinstance(value, LineSearch | PerRun) else _rule(value)


def entries(setting: Rates | None) -> int | None:
    """Return for how many steps ``setting`` lists a rate; None where it is no such list."""
    return len(setting) if isinstance(setting, list) and not _is_filters(setting) else None


def check_rates(setting: Rates, steps: int | None) -> None:
    """Check that ``setting`` says a learning rate for each of ``steps`` (None: not known yet).

    Raises:
        InputError: too few or too many entries, or a rule whose length is not known.
    """
    if isinstance(setting, PerRun):
        for one in setting.runs:
            check_rates(one, steps)
    elif (count := entries(setting)) is not None and steps not in (None, count):
        raise InputError(f"learning_rate has {count} entries for {steps} steps: give one a step")
    elif isinstance(setting, Schedule):
        length = setting.steps or steps
        if length is None and setting.schedule != "constant":
            raise InputError(
                f"learning_rate: a {setting.schedule} schedule under --watch must know its "
                "length: add steps: N"
            )
        if setting.schedule == "constant" and setting.final not in (None, setting.peak):
            raise InputError(
                f"learning_rate: a constant schedule ends at its peak {setting.peak:g}: remove "
                "final, or use linear or cosine"
            )
        if length is not None and setting.warmup >= length:
            raise InputError(
                f"learning_rate: warmup {setting.warmup} leaves none of {length} steps: lower it"
            )


def rates_at(setting: Rates, index: int, steps: int | None, runs: int = 1) -> list[Rate]:
    """Return the rates of ``runs`` models at step ``index`` (from 0), which a list must have.

    Raises:
        InputError: another number of runs was given rates.
    """
    assert not isinstance(setting, LineSearch)  # whose rates the step finds out
    if isinstance(setting, PerRun):
        own: Any = [rule_at(one, index, steps) for one in setting.runs]
    elif isinstance(setting, list) and not _is_filters(setting):
        own = setting[index]
    else:
        own = rule_at(setting, index, steps)
    if not isinstance(own, list) or _is_filters(own):
        return [own] * runs
    if len(own) != runs:
        raise InputError(
            f"learning_rate has rates for {len(own)} runs, but step {index + 1} merges {runs}: "
            "give one for each"
        )
    return own


def rule_at(setting: Rate | Schedule, index: int, steps: int | None) -> Rate:
    """Return what a rule says for step ``index`` (from 0) of ``steps``; a rate says itself.

    A rule climbs linearly to ``peak`` over ``warmup`` steps, step ``warmup`` being the first at
    the peak, and reaches ``final`` (default: a tenth of the peak; the peak itself for
    ``constant``) at its last step, where it stays.
    """
    if not isinstance(setting, Schedule):
        return setting
    if index < setting.warmup:
        return setting.peak * (index + 1) / (setting.warmup + 1)
    if setting.schedule == "constant":
        return setting.peak
    length = setting.steps or steps
    assert length is not None  # check_rates saw to it
    last = length - 1 - setting.warmup
    progress = min((index - setting.warmup) / last, 1.0) if last > 0 else 0.0
    final = setting.final if setting.final is not None else setting.peak / 10
    if setting.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return setting.peak + (final - setting.peak) * progress


def scaled(rate: Any, factor: float) -> Any:
    """Return a rate, or a list of rates, times ``factor``, under every filter."""
    if isinstance(rate, list):
        return [scaled(one, factor) for one in rate]
    if isinstance(rate, dict):
        return {**rate, "value": scaled(rate["value"], factor)}
    return rate * factor


def rate_text(rate: Any) -> str:
    """Return a rate, or a list of rates, for tables: ``0.5``, ``mlp 0.3, 0.5``."""
    if isinstance(rate, list):
        return ", ".join(map(rate_text, rate))
    if isinstance(rate, dict):
        return f"{rate.get('filter', '')} {rate_text(rate['value'])}".strip()
    return "" if rate is None else f"{rate:.4g}"


def _is_filters(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _rule(value: Any) -> Rate | Schedule:
    if isinstance(value, Mapping) and "value" not in value:
        return Schedule.model_validate(value)
    return value if isinstance(value, Schedule) else _rate(value)


def _rate(value: Any) -> Rate:
    if isinstance(value, Mapping):
        value = [value]
    return [_filter(one) for one in value] if _is_filters(value) else _number(value)


def _filter(value: Mapping[str, Any]) -> dict[str, Any]:
    unknown = value.keys() - {"filter", "value"}
    if unknown or "value" not in value:
        raise ValueError(f"{dict(value)!r} must be {{filter: …, value: …}}, or {{value: …}}")
    number = value["value"]
    many = isinstance(number, list) and number
    return {**value, "value": [_number(one) for one in number] if many else _number(number)}


def _number(value: Any) -> float:
    try:
        found = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = float("nan")
    if not 0 < found <= HIGHEST_LEARNING_RATE:
        raise ValueError(f"must lie in (0, {HIGHEST_LEARNING_RATE:g}], not {value!r}; {_FORMS}")
    return found
