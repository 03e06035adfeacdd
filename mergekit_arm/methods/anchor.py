"""The base of a method that takes none: AIM's anchor, and an input only where the user says so.

``linear`` and ``passthrough`` merge all their inputs alike. Under AIM the base comes in as well,
since AIM relaxes towards it. It enters the wrapped merge, as it would without AIM, where the user
gave it a value of its own for one of that merge's parameters, such as a weight. To tell, these
parameters get a default that marks a value as absent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any

from mergekit.merge_methods import MergeMethodSpec, ParameterScope, PerGroupValues, PerInputValues
from mergekit.merge_methods.base import ParameterSpec
from pydantic import BeforeValidator

from mergekit_arm.errors import InputError
from mergekit_arm.methods.planning import PlannedTensor


class _Absent:
    """A value that the user did not give; one object, also after pickling and copying."""

    def __reduce__(self) -> str:
        return "ABSENT"

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def with_absent(parameters: Sequence[ParameterSpec]) -> tuple[ParameterSpec, ...]:
    """Return the parameters with those of each input absent by default."""
    return tuple(
        dataclasses.replace(one, value_type=_or_absent(one), default=ABSENT)
        if one.scope == ParameterScope.INPUT
        else one
        for one in parameters
    )


def of_each_input(spec: MergeMethodSpec) -> list[ParameterSpec]:
    """Return the wrapped method's parameters that each input has a value of."""
    return [one for one in spec.parameters if one.scope == ParameterScope.INPUT]


def entering(
    spec: MergeMethodSpec, ids: Sequence[Hashable], base: Hashable, parameters: Mapping[str, Any]
) -> list[Hashable]:
    """Return which of ``ids`` are inputs of the wrapped merge."""
    given = any(parameters[one.name][base] is not ABSENT for one in of_each_input(spec))
    return [one for one in ids if given or one != base]


def values_of(
    spec: MergeMethodSpec, ids: Sequence[Hashable], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the wrapped merge's parameters for the inputs ``ids``, defaults filled in.

    Raises:
        InputError: an input lacks a parameter that has no default.
    """
    found = {one.name: parameters[one.name] for one in spec.parameters}
    for one in of_each_input(spec):
        values = [(model, found[one.name][model]) for model in ids]
        lacking = [model for model, value in values if value is ABSENT]
        if lacking and one.required:
            raise InputError(f"{lacking[0]} has no {one.name}; set it under its parameters")
        found[one.name] = PerInputValues(
            [(model, one.default if value is ABSENT else value) for model, value in values]
        )
    return found


def check_anchor(spec: MergeMethodSpec, planned: PlannedTensor) -> None:
    """Refuse values for the base that may have been meant for the other inputs alone.

    mergekit puts a base that is not listed among the models behind them, and gives it what stands
    under the top-level parameters.

    Raises:
        InputError: such a value, with the two ways to say what is meant.
    """
    names = [one.name for one in of_each_input(spec)]
    given = [name for name in names if planned.parameters[name][planned.base] is not ABSENT]
    if given and list(planned.names)[-1] == planned.base:
        raise InputError(
            f"{given[0]}: does base_model take part in the {spec.name} merge? If so, list it first "
            f"under models; if not, set {given[0]} under each of the other models only"
        )


def fill_absent(
    spec: MergeMethodSpec,
    ids: Sequence[Hashable],
    base: Hashable,
    supplied: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a direct call supplies, with the base's values absent where it gives none.

    One value for all inputs, or as many as there are other inputs, leave the base out; a mapping
    that has the base, or a value for every input, lets it in.
    """
    others = [one for one in ids if one != base]

    def complete(value: Any) -> Any:
        if isinstance(value, PerGroupValues):
            return PerGroupValues([complete(one) for one in value.values])
        if isinstance(value, Mapping):
            return {base: ABSENT, **value}
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            return (
                {base: ABSENT, **dict(zip(others, value, strict=True))}
                if len(value) == len(others)
                else value
            )
        return {base: ABSENT, **dict.fromkeys(others, value)}

    names = {one.name for one in of_each_input(spec)}
    return {name: complete(v) if name in names else v for name, v in supplied.items()}


def _or_absent(parameter: ParameterSpec) -> Any:
    validate = parameter.validate
    return Annotated[Any, BeforeValidator(lambda v: v if v is ABSENT else validate(v))]
