"""Every place of a merge configuration where parameters may stand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

Place = tuple[str | int, ...]
"""Keys and indices from the top: ``("models", 0, "parameters")``."""


@dataclass(frozen=True)
class Level:
    """One ``parameters`` of a configuration."""

    place: Place
    settings: Mapping[str, Any]
    model: ModelReference | None = None
    """Whose it is; None: of everything below it."""
    base: ModelReference | None = None
    """Of the merge, or of the output slice it lies in."""


def levels(config: MergeConfiguration) -> Iterator[Level]:
    """Yield every ``parameters`` that is written in a configuration."""
    base = config.base_model
    yield from _level((), config, None, base)
    yield from _part((), config, base)
    for name, module in (config.modules or {}).items():
        yield from _level(("modules", name), module, None, base)
        yield from _part(("modules", name), module, base)


def _part(place: Place, part: Any, base: ModelReference | None) -> Iterator[Level]:
    """Yield the levels of a part that has models or slices."""
    for number, model in enumerate(part.models or []):
        yield from _level((*place, "models", number), model, model.model, base)
    for number, output in enumerate(part.slices or []):
        inner = (*place, "slices", number)
        own_base = output.base_model or base
        yield from _level(inner, output, None, own_base)
        for index, source in enumerate(output.sources):
            yield from _level((*inner, "sources", index), source, source.model, own_base)


def _level(
    place: Place, holder: Any, model: ModelReference | None, base: ModelReference | None
) -> Iterator[Level]:
    if holder.parameters is not None:
        yield Level((*place, "parameters"), holder.parameters, model, base)
