"""Learning rates: one number, one a step, or a rule."""

from __future__ import annotations

import math

from mergekit_arm.errors import InputError
from mergekit_arm.streaming.config import Schedule

Rates = float | list[float] | Schedule


def check_rates(setting: Rates, steps: int | None) -> None:
    """Check that ``setting`` says a learning rate for each of ``steps`` (None: not known yet).

    Raises:
        InputError: too few or too many entries, or a rule whose length is not known.
    """
    if isinstance(setting, list):
        if steps is not None and len(setting) != steps:
            raise InputError(
                f"learning_rate has {len(setting)} entries for {steps} steps: give one a step"
            )
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


def rate_at(setting: Rates, index: int, steps: int | None) -> float | None:
    """Return the learning rate of step ``index`` (from 0) of ``steps``, None past a list's end.

    A rule climbs linearly to ``peak`` over ``warmup`` steps, step ``warmup`` being the first at
    the peak, and reaches ``final`` (default: a tenth of the peak; the peak itself for
    ``constant``) at its last step, where it stays.
    """
    if isinstance(setting, list):
        return float(setting[index]) if index < len(setting) else None
    if not isinstance(setting, Schedule):
        return float(setting)
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
