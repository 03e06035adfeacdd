"""Settings that no tensor reads: filters that match nothing, or come too late.

For each tensor mergekit takes the first filter of a setting that is part of the tensor's name; of a
shared parameter the output's name counts, of an input's parameter the input's own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.merge_methods import MergeMethodSpec, ParameterScope

from mergekit_arm.checking.document import Place
from mergekit_arm.checking.findings import Findings
from mergekit_arm.checking.planning import Planned
from mergekit_arm.errors import did_you_mean
from mergekit_arm.methods.levels import levels


class _Reads:
    """Which settings the planned tensors have read."""

    def __init__(self, settings: Mapping[Place, Mapping[str, Any]]) -> None:
        self._settings = settings
        self.hits: dict[Place, set[int]] = defaultdict(set)
        """Of each setting, the filters that were the first to match."""
        self.names: dict[Place, set[str]] = defaultdict(set)
        """Of each setting, the tensors that were looked up in it."""

    def look_up(self, parameter: str, places: Sequence[Place], name: str) -> None:
        """Look up one parameter of one tensor, as mergekit does."""
        for level in places:
            setting = self._settings.get(level, {}).get(parameter)
            if setting is None:
                continue
            place = (*level, parameter)
            self.names[place].add(name)
            for number, condition in enumerate(conditions(setting)):
                if condition in (None, "*") or condition in name:
                    self.hits[place].add(number)
                    return


def check_read(
    config: MergeConfiguration,
    spec: MergeMethodSpec,
    planned: Iterable[Planned],
    findings: Findings,
) -> None:
    """Find settings, or filters in them, that none of the planned tensors reads."""
    written = {level.place: level.settings for level in levels(config)}
    reads = _Reads(written)
    for one in planned:
        for parameter in spec.shared_parameters:
            reads.look_up(parameter.name, one.shared, one.weight.name)
        for parameter in spec.input_parameters:
            for model, weight in one.inputs.items():
                base = one.task is not None and model == one.task.base_model
                if not base or parameter.scope == ParameterScope.INPUT:
                    reads.look_up(parameter.name, one.own[model], weight.name)
    known = {parameter.name for parameter in spec.parameters}
    for level, settings in written.items():
        for name, setting in settings.items():
            place = (*level, name)
            if name in known and place in reads.names:
                _check_setting(place, setting, reads, findings)
            elif name in known and level == ("parameters",):
                findings.note(place, "has no effect: every model has a value of its own")


def conditions(setting: Any) -> list[str | None]:
    """Return the filters of a setting in their order; None: it holds for every tensor."""
    found = setting if isinstance(setting, list) else [setting]
    if not found or not all(isinstance(one, ConditionalParameter) for one in found):
        return [None]
    return [one.filter for one in found]


def _check_setting(place: Place, setting: Any, reads: _Reads, findings: Findings) -> None:
    names = reads.names[place]
    several = isinstance(setting, list)
    for number, condition in enumerate(conditions(setting)):
        if number in reads.hits[place]:
            continue
        where = (*place, number) if several else place
        if condition not in (None, "*") and not any(str(condition) in name for name in names):
            parts = {part for name in names for part in re.split(r"\.", name) if part}
            findings.error(
                where,
                f"filter {condition!r} matches no tensor"
                f"{did_you_mean(str(condition), sorted(parts))}; a filter is a part of a tensor's "
                f"name, such as {min(names, key=len)}",
            )
        elif condition is None:
            findings.note(where, "has no effect: the filters before it match every tensor")
        else:
            findings.error(
                where, "is never reached: earlier filters match every tensor of it; move it up"
            )
