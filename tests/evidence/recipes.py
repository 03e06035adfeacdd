"""Merges, as names and parameters of mergekit's methods."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Statistics:
    """A directory of statistics, by what it is of: ``general``, ``task``, ``random`` …"""

    of: str
    each: bool = False
    """Whether every model has such a directory of its own; else there is the base's alone."""

    def __str__(self) -> str:
        return f"<{self.of}>"


@dataclass(frozen=True)
class ByName:
    """A parameter with a value for weights whose name contains a pattern; the first that fits."""

    values: tuple[tuple[str, float], ...]

    def __call__(self, names: Sequence[str]) -> list[float]:
        """Return each weight's value."""
        return [next(value for part, value in self.values if part in name) for name in names]

    def __str__(self) -> str:
        return ", ".join(f"{part or 'others'} {value}" for part, value in self.values)


@dataclass(frozen=True)
class ByDepth:
    """A parameter that goes in a straight line from the first layer to the last."""

    first: float
    last: float

    def __call__(self, names: Sequence[str]) -> list[float]:
        """Return each weight's value; those outside the layers have that of the nearer end."""
        found = [re.search(r"\.layers\.(\d+)\.", name) for name in names]
        deepest = max(int(match[1]) for match in found if match)
        values = []
        for name, match in zip(names, found, strict=True):
            depth = int(match[1]) / max(deepest, 1) if match else float("embed" not in name)
            values.append(self.first + (self.last - self.first) * depth)
        return values

    def __str__(self) -> str:
        return f"{self.first} to {self.last}"


Settings = Mapping[str, Any]
"""Parameters of a method; directories of statistics are ``Statistics``."""


@dataclass(frozen=True)
class Recipe:
    """One merge, and the settings that are tried for it on the validation split."""

    label: str
    method: str
    """mergekit's name of it."""
    models: tuple[str, ...]
    grid: tuple[Settings, ...]

    def tried(self, number: int) -> str:
        """Return the label of the merge with the given settings of the grid."""
        return self.label if len(self.grid) == 1 else f"{self.label} [{number}]"


def plain(settings: Settings) -> dict[str, Any]:
    """Return settings as JSON keeps them."""
    known = Statistics | ByName | ByDepth
    return {name: str(v) if isinstance(v, known) else v for name, v in settings.items()}
