"""Merges, as names and parameters of mergekit's methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Statistics:
    """A directory of statistics, by what it is of: ``general``, ``task``, ``own``, ``random`` …

    ``own`` stands for each model's own.
    """

    of: str

    def __str__(self) -> str:
        return f"<{self.of}>"


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
    return {k: str(v) if isinstance(v, Statistics) else v for k, v in settings.items()}
