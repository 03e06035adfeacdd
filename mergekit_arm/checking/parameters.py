"""Parameters: whether the method has them, and whether it looks where they stand.

mergekit reads a *shared* parameter at the top level, in a module, and in an output slice; a
parameter *of each input* there and under the model; one *of each input but the base* there and
under models other than the base. What stands elsewhere is ignored in silence.
"""

from __future__ import annotations

from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.merge_methods import MergeMethodSpec, ParameterScope
from mergekit.merge_methods.base import ParameterSpec
from pydantic import ValidationError

from mergekit_arm.checking.document import Place
from mergekit_arm.checking.findings import Findings
from mergekit_arm.checking.keys import remedy
from mergekit_arm.errors import InputError
from mergekit_arm.methods.levels import levels
from mergekit_arm.methods.parameters import outside


def check_parameters(config: MergeConfiguration, spec: MergeMethodSpec, findings: Findings) -> None:
    """Find parameters that the method does not have, or not where they stand."""
    known = {one.name: one for one in spec.parameters}
    for level in levels(config):
        for name, setting in level.settings.items():
            place = (*level.place, name)
            parameter = known.get(name)
            if parameter is None:
                findings.error(
                    place,
                    f"{spec.name} has no parameter {name!r}{remedy(name, list(known), place)}"
                    if known
                    else f"{spec.name} has no parameters: remove it",
                )
            elif level.model is not None and parameter.scope == ParameterScope.SHARED:
                findings.error(
                    place,
                    f"{spec.name} reads {name} once for all models, and not under one of them: "
                    "move it to the top-level parameters",
                )
            elif (
                level.model == level.base
                and level.model is not None
                and (parameter.scope == ParameterScope.NON_BASE)
            ):
                findings.error(
                    place,
                    f"{spec.name} reads {name} of every model but the base, and this is the base: "
                    "remove it",
                )
            else:
                _check_values(parameter, setting, place, findings)


def _check_values(parameter: ParameterSpec, setting: Any, place: Place, findings: Findings) -> None:
    """Find values that the parameter cannot have."""
    several = setting if isinstance(setting, list) and setting else [setting]
    for value in (getattr(one, "value", one) for one in several):
        if value == []:
            findings.error(place, "an empty list says nothing: write a value, or remove it")
        for one in value if isinstance(value, list) else [value]:
            try:
                validated = parameter.validate(one)
            except InputError as error:
                findings.error(place, error.message)
            except ValidationError as error:
                findings.error(place, f"{one!r} does not do: {error.errors()[0]['msg']}")
            else:
                if problem := outside(parameter, validated):
                    findings.error(place, problem)
