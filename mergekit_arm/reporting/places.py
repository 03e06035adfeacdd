"""The layer and the kind of a weight, from its name: the axes of the heat maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from mergekit_arm.inspecting.inputs import layer_of


@dataclass(frozen=True)
class LayerPlace:
    """Where a weight stands."""

    layer: int | None
    """None: outside the layers."""
    kind: str
    """What distinguishes it from the others of its layer, such as ``q_proj``."""


def places(names: Iterable[str]) -> dict[str, LayerPlace]:
    """Return the place of every weight.

    A kind is the shortest end of the name, without numbers and ``.weight``, that no other kind
    has: experts of one layer are of one kind.
    """
    roles = {name: _role(name) for name in names}
    endings = Counter(
        role[-length:] for role in set(roles.values()) for length in range(1, len(role) + 1)
    )
    short = {
        role: next(role[-n:] for n in range(1, len(role) + 1) if _alone(role, n, endings))
        for role in set(roles.values())
    }
    return {name: LayerPlace(layer_of(name), ".".join(short[role])) for name, role in roles.items()}


def means(cells: Mapping[LayerPlace, Collection[float]]) -> dict[tuple[str, int], float]:
    """Return the mean of every kind and layer; what is outside the layers is left out."""
    return {
        (place.kind, place.layer): sum(values) / len(values)
        for place, values in cells.items()
        if place.layer is not None and values
    }


def _role(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.removesuffix(".weight").split(".") if not part.isdecimal())


def _alone(role: tuple[str, ...], length: int, endings: Counter[tuple[str, ...]]) -> bool:
    return length == len(role) or endings[role[-length:]] == 1
