"""The kinds of statistics there are. Read ``base.py`` first, then ``importance.py``.

``subspace.py`` follows, with its mathematics in ``second_moment.py``; ``site.py`` joins what all
kinds record of an input. To add a kind, write one
file like ``importance.py`` and one line at the end of this one; or call ``register`` from a
package of your own, before ``calibrate``, ``combine`` or a merge.
"""

from __future__ import annotations

from collections.abc import Iterable

from mergekit_arm.errors import InputError, did_you_mean
from mergekit_arm.statistics.kinds.base import Kind
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.kinds.subspace import SUBSPACE

ALL = "all"
"""Stands for every kind."""

_KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> None:
    """Make ``kind`` known to ``calibrate``, ``combine`` and the reader, by its name.

    Raises:
        ValueError: another kind has its name, or stores a tensor under the same key.
    """
    if kind.name in {ALL, *_KINDS}:
        raise ValueError(f"a kind of statistic named {kind.name!r} is registered already")
    for other in _KINDS.values():
        if common := _keys(kind) & _keys(other):
            raise ValueError(
                f"{kind.name} and {other.name} both store {', '.join(sorted(common))}: "
                "keys must differ among all kinds"
            )
    _KINDS[kind.name] = kind


def unregister(name: str) -> None:
    """Forget a kind, as a test does with its own."""
    del _KINDS[name]


def kinds() -> tuple[Kind, ...]:
    """Return every kind, in the order of registration."""
    return tuple(_KINDS.values())


def kind(name: str) -> Kind:
    """Return the kind of that name.

    Raises:
        InputError: there is none.
    """
    if name not in _KINDS:
        raise InputError(
            f"no kind of statistic named {name!r}{did_you_mean(name, _KINDS)}; there are: "
            f"{', '.join(_KINDS)}"
        )
    return _KINDS[name]


def chosen(names: Iterable[str]) -> tuple[Kind, ...]:
    """Return the kinds of these names, in the order of registration; ``all`` is every one.

    Raises:
        InputError: a name is not known, or there is none.
    """
    wanted = {name: None if name == ALL else kind(name) for name in names}
    if not wanted:
        raise InputError(f"no kind of statistic chosen; there are: {', '.join(_KINDS)}")
    return kinds() if ALL in wanted else tuple(one for one in kinds() if one.name in wanted)


def _keys(kind: Kind) -> set[str]:
    return {*kind.state(1), *kind.stored(1)}


register(IMPORTANCE)
register(SUBSPACE)
