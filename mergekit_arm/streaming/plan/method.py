"""Which merge methods can be steps of a stream, and where their learning rate goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.merge_methods import BasePolicy, MergeMethod, ParameterScope
from mergekit.merge_methods.base import ParameterSpec

from mergekit_arm.errors import InputError, did_you_mean
from mergekit_arm.methods import find_method
from mergekit_arm.methods.arm import TASK, together
from mergekit_arm.methods.base import STATS, StatisticsMethod
from mergekit_arm.methods.parameters import MEASURED_ON
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.kinds.subspace import SUBSPACE

_STATISTICS_OF = {"omega": IMPORTANCE.name, "rotation": SUBSPACE.name}
"""A parameter that only methods with this need have → the statistics they read."""


@dataclass(frozen=True)
class StepMethod:
    """A merge method as the stream uses it."""

    name: str
    rate_parameter: str | None
    """The method's parameter that scales the update; None: it has no such parameter."""
    rate_is_shared: bool
    """Whether that parameter belongs under the top-level ``parameters``."""
    statistics: tuple[str, ...]
    """The statistics it reads; empty: none."""
    fixed: Mapping[str, Any]
    """Parameters without whose value the learning rate would mean nothing."""
    specs: Mapping[str, ParameterSpec]
    """What it declares, by parameter."""


def fit_method(
    name: str, parameters: Mapping[str, Any], retains: bool = False, models: int = 1
) -> StepMethod:
    """Return how ``name`` takes part in a stream with the user's ``parameters``.

    ``retains``: the model is measured on the task's text as well, so as not to forget.
    ``models``: how many checkpoints a step merges, at most.

    Raises:
        InputError: no such method, not one for a base and so many models, or parameters that it
            does not have, lacks, or that the stream itself sets.
    """
    method = find_method(name)
    inner = getattr(method, "inner", method)  # whose update AIM relaxes
    _check_inputs(method, inner, models)
    rate_parameter, shared = _rate_parameter(inner)
    specs, fixed = {spec.name: spec for spec in method.spec.parameters}, {}
    if rate_parameter == "weight" and "normalize" in specs:
        fixed = {"normalize": False}  # else a single weight is divided by itself
        if parameters.get("normalize") not in (None, False):
            raise InputError(
                "parameters: normalize divides the learning rate by itself when a step merges one "
                "model; remove it"
            )
    if retains and TASK not in specs:
        raise InputError(
            f"calibration.task: {name} has no use for it; name the dataset under calibration itself"
        )
    problem = together(parameters, task=retains) if TASK in specs else None
    if problem:
        raise InputError(f"parameters: {problem}, which calibration.task measures")
    for key in parameters:
        if key == MEASURED_ON and key in specs:
            raise InputError(f"parameters: {key}: the stream sets it where it holds; remove it")
        if key == rate_parameter:
            raise InputError(f"parameters: {key} is {name}'s learning rate: set learning_rate")
        if key not in specs:
            own = [o for o in specs if o not in (rate_parameter, MEASURED_ON)]
            raise InputError(
                f"parameters: {name} has no parameter {key!r}{did_you_mean(key, own)}; "
                f"there are: {', '.join(own) or 'none'}"
            )
    for spec in method.spec.parameters:
        if spec.required and spec.name not in (*parameters, rate_parameter, STATS):
            raise InputError(f"parameters: {name} needs {spec.name}; add it")
    statistics: tuple[str, ...] = ()
    if STATS in specs:
        statistics = tuple(
            kind
            for key, kind in _STATISTICS_OF.items()
            if key in specs or (retains and TASK in specs)
        )
    return StepMethod(name, rate_parameter, shared, statistics, fixed, specs)


def _check_inputs(method: MergeMethod, inner: MergeMethod, models: int) -> None:
    problem = None
    if isinstance(inner, StatisticsMethod) and inner.base_optional:
        problem = "weighs models against each other, and a step merges one"
    elif inner.spec.contract.base not in (BasePolicy.REQUIRED, BasePolicy.OPTIONAL):
        problem = "takes no base, so that a step would forget the model it starts from"
    try:
        method.validate_inputs(["base", *range(models)], "base")
    except ValueError as error:
        many = "one model" if models == 1 else f"{models} models"
        problem = f"cannot be a step, which merges {many} into a base ({error})"
    if problem:
        raise InputError(
            f"merge_method: {method.spec.name} {problem}; use arm, aim, task_arithmetic or another "
            "that can"
        )


def _rate_parameter(method: MergeMethod) -> tuple[str | None, bool]:
    scopes = {spec.name: spec.scope for spec in method.spec.parameters}
    if "learning_rate" in scopes:
        return "learning_rate", False
    required = method.spec.contract.base == BasePolicy.REQUIRED
    if required and scopes.get("weight") == ParameterScope.NON_BASE:
        return "weight", False
    # Other methods' t are thresholds, not a way from the base to the model.
    if method.spec.name == "slerp":
        return "t", True
    return None, False
