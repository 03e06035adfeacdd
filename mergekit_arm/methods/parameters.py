"""Parameters of our methods: validated while mergekit plans, refused with one line.

mergekit declares parameters by a type; the validators here raise ``InputError``, which pydantic
does not wrap, so that its commands end without a traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator

from mergekit_arm.errors import InputError, did_you_mean
from mergekit_arm.statistics.read import open_statistics


def parameter_type(validator: Callable[[Any], Any]) -> Any:
    """Return the declared type of a parameter that ``validator`` checks and converts."""
    return Annotated[Any, BeforeValidator(validator)]


def number(
    name: str, low: float, high: float, *, open_low: bool = False, hint: str = ""
) -> Callable[[Any], float]:
    """Return a validator for a finite number in [low, high], or (low, high]."""
    interval = f"{'(' if open_low else '['}{low:g}, {high:g}]"

    def validate(value: Any) -> float:
        try:
            found = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            found = float("nan")
        if not low <= found <= high or (open_low and found == low):
            raise InputError(
                f"{name} must lie in {interval}, not {value!r}{': ' if hint else ''}{hint}"
            )
        return found

    return validate


def choice(name: str, known: tuple[str, ...]) -> Callable[[Any], str]:
    """Return a validator for one of ``known``."""

    def validate(value: Any) -> str:
        if value not in known:
            raise InputError(
                f"{name} must be {' or '.join(known)}, not {value!r}"
                f"{did_you_mean(str(value), known)}"
            )
        return str(value)

    return validate


def statistics_reference(reference: Any) -> str:
    """Validate ``activation_stats``: open the directory now, so that a bad one fails early.

    Raises:
        InputError: not a string, or not a readable statistics directory.
    """
    if not isinstance(reference, str) or not reference:
        raise InputError(
            f"activation_stats must be a directory or a Hub name, not {reference!r}; "
            "`mergekit-arm calibrate MODEL DIRECTORY` writes one"
        )
    open_statistics(reference)
    return reference
