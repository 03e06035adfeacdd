"""Parameters of our methods: declared in one line each, refused in one line each.

mergekit declares a parameter by a type, and validates what the user wrote while it plans. The
validators here raise ``InputError``, which pydantic does not wrap, so that mergekit's commands end
without a traceback.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from mergekit.merge_methods import ParameterScope
from mergekit.merge_methods.base import ParameterSpec
from pydantic import BeforeValidator

from mergekit_arm.errors import InputError, did_you_mean
from mergekit_arm.statistics.read import Identity, Statistics, open_statistics

MEASURED_ON = "measured_on"
"""The parameter by which statistics of an earlier model of a stream serve a later one."""


@dataclass(frozen=True)
class Interval:
    """[low, high], or (low, high] where ``open_low``."""

    low: float
    high: float
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and not (self.open_low and value == self.low)

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


_SHARES = {"density": Interval(0.0, 1.0), "select_topk": Interval(0.0, 1.0)}
"""Shares of the weights to keep, which mergekit's methods declare as numbers without bounds: with
5, where 0.5 was meant, they keep everything, in silence."""


class Unwritten(float):
    """A parameter's default, where the user wrote nothing: equal to any other of its value."""


class StatisticsReference(str):
    """A validated ``activation_stats``: what the user wrote, and what is known of its merge.

    mergekit validates a parameter anew for every output tensor of every merge, and hands what the
    validator returned to the method when that tensor is merged. So this object belongs to one
    tensor of one planned merge, and carries what planning has found out about it. It is otherwise
    a string, and can be pickled.
    """

    names: Mapping[Hashable, str] | None = None
    """Each input's own name of the tensor, by model; None where no merge was planned, as under
    ``merge_state_dicts``. After slices these differ from the output's name."""
    opened: Identity | None = None
    """The directory that was opened when the value was validated; None: any will do."""

    def open(self) -> Statistics:
        """Return the statistics, as long as they are those that the merge was planned with.

        Raises:
            InputError: there is another directory now, or it cannot be read.
        """
        statistics = open_statistics(str(self))
        if self.opened not in (None, statistics.identity):
            raise InputError(
                f"activation_stats {self}: was replaced since the merge was planned, which would "
                "mix two measurements; leave it alone, and merge again"
            )
        return statistics


def number(
    name: str,
    default: float,
    low: float,
    high: float,
    description: str,
    *,
    scope: ParameterScope = ParameterScope.SHARED,
    open_low: bool = False,
    hint: str = "",
) -> ParameterSpec:
    """Declare a finite number in [low, high], or in (low, high] where ``open_low``.

    ``hint`` ends the message that refuses another value.
    """
    interval = Interval(low, high, open_low)

    def validate(value: Any) -> float:
        if isinstance(value, Unwritten):
            return value
        try:
            found = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            found = float("nan")
        if found not in interval:
            raise InputError(
                f"{name} must lie in {interval}, not {value!r}{': ' if hint else ''}{hint}"
            )
        return found

    return _declare(name, Unwritten(default), description, scope, validate, interval)


def choice(
    name: str,
    default: str,
    known: tuple[str, ...],
    description: str,
    *,
    scope: ParameterScope = ParameterScope.SHARED,
) -> ParameterSpec:
    """Declare one of the words ``known``."""

    def validate(value: Any) -> str:
        if value not in known:
            raise InputError(
                f"{name} must be {' or '.join(known)}, not {value!r}"
                f"{did_you_mean(str(value), known)}"
            )
        return str(value)

    return _declare(name, default, description, scope, validate, known)


def statistics(
    name: str,
    description: str,
    scope: ParameterScope = ParameterScope.SHARED,
    *,
    optional: bool = False,
) -> ParameterSpec:
    """Declare a statistics directory or Hub name, opened as soon as it is validated.

    ``optional``: it may be left out, and is None then.
    """

    def validate(reference: Any) -> StatisticsReference | None:
        return None if optional and reference is None else _reference(name, reference)

    # No default would be refused by mergekit, with a traceback; None is refused by us.
    return _declare(name, None, description, scope, validate)


def earlier_model() -> ParameterSpec:
    """Declare ``measured_on``: which earlier model of a stream the base's statistics are of."""

    def validate(value: Any) -> str | None:
        if value is not None and not re.fullmatch("[0-9a-f]{16,64}", str(value)):
            raise InputError(
                f"{MEASURED_ON} must be the content_hash in the statistics' metadata (16 or more "
                f"of its digits), not {value!r}"
            )
        return None if value is None else str(value)

    return _declare(
        MEASURED_ON,
        None,
        "Content hash of the earlier model whose statistics these are; finds weights by name",
        ParameterScope.SHARED,
        validate,
    )


def found_by_name(statistics: Statistics, parameters: Mapping[str, Any]) -> bool:
    """Say whether the user declares that ``statistics`` are of an earlier model than the base.

    Raises:
        InputError: they are not of the model that ``measured_on`` names.
    """
    declared = parameters.get(MEASURED_ON)
    measured = statistics.metadata.model.content_hash
    if declared is not None and not measured.startswith(declared):
        raise InputError(
            f"activation_stats {statistics.reference} were measured on {measured[:16]}…, and "
            f"{MEASURED_ON} says {declared[:16]}…: use the statistics that it names, or remove it"
        )
    return declared is not None


def range_of(parameter: ParameterSpec) -> Interval | tuple[str, ...] | None:
    """Return the numbers or words that a parameter may be, as far as that is known.

    Of ours it is declared, of mergekit's it is known of shares; None of every other.
    """
    for note in getattr(parameter.value_type, "__metadata__", ()):
        if isinstance(note, Interval | tuple):
            return note
    return _SHARES.get(parameter.name)


def outside(parameter: ParameterSpec, value: Any) -> str | None:
    """Say that a validated number is outside what its parameter may be; None where it is not.

    Parameters of ours refuse such a value themselves: this is for mergekit's shares.
    """
    bounds = range_of(parameter)
    if not isinstance(bounds, Interval) or not isinstance(value, float) or value in bounds:
        return None
    return f"{value:g} is outside {bounds}: {parameter.name} is the share of the weights to keep"


def _reference(name: str, reference: Any) -> StatisticsReference:
    if isinstance(reference, StatisticsReference):
        return reference  # a method that wraps another hands on what it was given
    if not isinstance(reference, str) or not reference:
        raise InputError(
            f"{name} must be a directory or a Hub name, not {reference!r}; "
            "`mergekit-arm calibrate MODEL DIRECTORY` writes one"
        )
    found = StatisticsReference(reference)
    found.opened = found.open().identity
    return found


def _declare(
    name: str,
    default: Any,
    description: str,
    scope: ParameterScope,
    validate: Callable[[Any], Any],
    *notes: Any,
) -> ParameterSpec:
    declared: Any = Annotated[Any, BeforeValidator(validate)]
    for note in notes:
        declared = Annotated[declared, note]
    return ParameterSpec(name, declared, scope, default=default, description=description)
