"""Numbers of a merge configuration that are to be found: where they stand, and what they may be.

Wherever mergekit's grammar takes a number, ``{tune: [low, high]}`` may stand for it::

    weight: {tune: [0.2, 1.2]}                     # a range; log: true, int: true
    density: {tune: [0.2, 0.5, 0.8], choice: true}
    weight: [{filter: mlp, value: {tune: [0, 1]}}, {value: 0.5}]
    omega: [{tune: [0, 1]}, 0.4, {tune: [0, 1]}]   # points of a gradient
    weight: {tune: [0, 1], name: w}                # equal wherever the name w stands

``merge_method: {tune: [ties, aim_ties]}`` is the one space outside ``parameters``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_arm.errors import InputError, did_you_mean
from mergekit_arm.tuning.naming import Path, describe_place

Value = float | int | str | bool

METHOD = "merge_method"
TUNE = "tune"
SPACE_KEYS = (TUNE, "choice", "log", "int", "name")
_INPUTS = ("models", "slices", "sources", "modules")
"""Keys under which a merge's inputs, and their parameters, are listed."""


@dataclass(frozen=True)
class Domain:
    """What one number, or word, may be: a range, or one of ``choices``."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    choices: tuple[Value, ...] = ()

    def ends(self) -> tuple[Value, ...]:
        """Return what must be valid for all of the domain to be: both ends, or every choice."""
        return self.choices or (self._point(self.low), self._point(self.high))

    def middle(self) -> Value:
        """Return the middle of a range, by ratio where it is searched so; the first choice."""
        return self.points(3)[1] if not self.choices else self.choices[0]

    def points(self, count: int) -> list[Value]:
        """Return at most ``count`` values, both ends among them; every choice of such."""
        if self.choices:
            return list(self.choices)
        shares = [i / (count - 1) for i in range(count)] if count > 1 else [0.5]
        if self.log:
            first, last = math.log(self.low), math.log(self.high)
            found = [math.exp(first + share * (last - first)) for share in shares]
        else:
            found = [self.low + share * (self.high - self.low) for share in shares]
        return list(dict.fromkeys(self._point(value) for value in found))

    def _point(self, value: float) -> Value:
        inside = min(max(value, self.low), self.high)  # a logarithm's rounding may leave it
        return round(inside) if self.integer else inside

    def __contains__(self, value: object) -> bool:
        if self.choices:
            return value in self.choices
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= float(value) <= self.high  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.choices:
            return " | ".join(map(str, self.choices))
        notes = [word for word, true in (("log", self.log), ("int", self.integer)) if true]
        return f"[{self.low:g}, {self.high:g}]{' ' if notes else ''}{' '.join(notes)}"


@dataclass(frozen=True)
class Dimension:
    """One unknown, and every place that its value goes to."""

    name: str
    domain: Domain
    places: tuple[Path, ...]
    parameters: frozenset[str]
    """The parameters that it is a value of."""


@dataclass(frozen=True)
class Space:
    """A document with unknowns in it."""

    document: Mapping[str, Any]
    methods: tuple[str, ...]
    """One, or those that are compared."""
    dimensions: tuple[Dimension, ...]

    @property
    def compares(self) -> bool:
        """Whether there are several methods."""
        return len(self.methods) > 1

    def fill(self, method: str, values: Mapping[str, Value], known: frozenset[str]) -> Any:
        """Return the document with ``values`` by dimension in it: an ordinary configuration.

        Where methods are compared, parameters that are not ``known`` to this one are left out.
        """
        filled = _copy(self.document)
        for dimension in self.dimensions:
            if dimension.name in values:
                for place in dimension.places:
                    _put(filled, place, values[dimension.name])
        filled[METHOD] = method
        return _only_known(filled, known) if self.compares else filled


def find_space(document: Mapping[str, Any]) -> Space:
    """Find every space in a configuration.

    Raises:
        InputError: an empty or unclear space, two of one name that differ, one where mergekit
            takes no number, or none at all.
    """
    method = document.get(METHOD)
    methods = (method,) if isinstance(method, str) else _methods(method)
    found: dict[str, Dimension] = {}
    taken: dict[Path, str] = {}
    for place, space in _spaces({k: v for k, v in document.items() if k != METHOD}, ()):
        where = _dotted(place)
        parameter = _parameter(place)
        if parameter is None:
            raise InputError(
                f"{where}: mergekit takes no number here: {{tune: …}} may stand for a value under "
                f"parameters, or for {METHOD}"
            )
        domain, given = _read(space, where)
        name = given or _unique(describe_place(document, place), taken.values(), where)
        taken[place] = name
        other = found.get(name)
        if other is not None and other.domain != domain:
            raise InputError(
                f"{where}: {name} is {other.domain} elsewhere and {domain} here: one name is one "
                "number"
            )
        places, parameters = (other.places, other.parameters) if other else ((), frozenset())
        found[name] = Dimension(name, domain, (*places, place), parameters | {parameter})
    if not found and len(methods) == 1:
        raise InputError("nothing is to be tuned: write {tune: [LOW, HIGH]} in place of a number")
    return Space(dict(document), methods, tuple(found.values()))


def parameter_names(document: Any) -> Iterator[tuple[str, str]]:
    """Yield every parameter that a configuration sets: where, and its name."""
    for place, mapping in _parameter_mappings(document, ()):
        for name in mapping:
            yield _dotted((*place, str(name))), str(name)


def _methods(given: Any) -> tuple[str, ...]:
    listed = given.get(TUNE) if isinstance(given, Mapping) else None
    if not isinstance(listed, list) or not listed or not all(isinstance(m, str) for m in listed):
        raise InputError(f"{METHOD}: must be a name, or {{tune: [NAME, NAME]}}, not {given!r}")
    if len(set(listed)) < len(listed):
        raise InputError(f"{METHOD}: one name stands twice in {listed}")
    return tuple(listed)


def _spaces(node: Any, place: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    if isinstance(node, Mapping):
        if TUNE in node:
            yield place, node
            return
        for key, value in node.items():
            yield from _spaces(value, (*place, str(key)))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _spaces(value, (*place, index))


def _parameter(place: Path) -> str | None:
    """Return the parameter that the value at ``place`` belongs to; None where it is no value."""
    index = next((i for i, key in enumerate(place) if key == "parameters"), None)
    if index is None or index + 1 >= len(place):
        return None
    # Inputs first, then the parameter, then points of a gradient and values of filters.
    above, below = place[:index], place[index + 2 :]
    if above and above[0] not in _INPUTS:
        return None
    if any(isinstance(key, str) and key != "value" for key in below):
        return None
    return str(place[index + 1])


def _read(space: Mapping[str, Any], where: str) -> tuple[Domain, str | None]:
    for key in space:
        if key not in SPACE_KEYS:
            raise InputError(
                f"{where}: unknown key {key!r}{did_you_mean(str(key), SPACE_KEYS)}; a space has "
                f"{', '.join(SPACE_KEYS)}"
            )
    values, name = space[TUNE], space.get("name")
    if name is not None and not (isinstance(name, str) and name):
        raise InputError(f"{where}: name must be a word, not {name!r}")
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: tune is empty: write {{tune: [LOW, HIGH]}}")
    if space.get("choice"):
        if space.get("log") or space.get("int"):
            raise InputError(f"{where}: choices have neither log nor int")
        if not all(isinstance(value, str | int | float) for value in values):
            raise InputError(f"{where}: choices are numbers or words, not {values}")
        if len(set(map(repr, values))) < len(values):
            raise InputError(f"{where}: one choice stands twice in {values}")
        return Domain(choices=tuple(values)), name
    ends = [one for one in values if isinstance(one, int | float) and not isinstance(one, bool)]
    if len(ends) != 2 or len(values) != 2:
        raise InputError(
            f"{where}: {values} is no range of two numbers; add choice: true to try each of them"
        )
    low, high = (one if abs(one) < sys.float_info.max else math.inf for one in ends)
    log, integer = bool(space.get("log")), bool(space.get("int"))
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"{where}: the range {values} is empty: write [LOW, HIGH]")
    if log and low <= 0:
        raise InputError(f"{where}: a logarithm needs a range above 0, not {values}")
    if integer and not (float(low).is_integer() and float(high).is_integer()):
        raise InputError(f"{where}: int needs whole ends, not {values}")
    return Domain(float(low), float(high), log, integer), name


def _copy(node: Any) -> Any:
    """Copy a document; what YAML's anchors made one object in two places becomes two."""
    if isinstance(node, Mapping):
        return {key: _copy(value) for key, value in node.items()}
    return [_copy(value) for value in node] if isinstance(node, list) else node


def _unique(name: str, taken: Any, where: str) -> str:
    return name if name not in set(taken) else where


def _dotted(place: Path) -> str:
    return ".".join(map(str, place))


def _put(node: Any, place: Path, value: Value) -> None:
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value


def _parameter_mappings(node: Any, place: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "parameters" and isinstance(value, dict):
                yield (*place, key), value
            elif key in _INPUTS or (place and place[-1] == "modules"):
                yield from _parameter_mappings(value, (*place, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _parameter_mappings(value, (*place, index))


def _only_known(document: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    for _, mapping in list(_parameter_mappings(document, ())):
        for name in [name for name in mapping if name not in known]:
            del mapping[name]
    return document
