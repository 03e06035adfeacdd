"""How every command prints its result on standard output: tables, or one JSON document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.status import Status

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
quiet_option = click.option(
    "--quiet", is_flag=True, help="Show no progress; notes, errors and the result remain."
)


def working(text: str, *, quiet: bool) -> Status:
    """Return a moving sign for the duration of ``with``, drawn on a terminal unless ``quiet``."""
    # Not for --help, which stays instant.
    from rich.console import Console

    return Console(stderr=True, quiet=quiet).status(text)


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document; dataclasses, pydantic's models and paths are written out."""
    click.echo(json.dumps(document, indent=1, default=_plain))


def print_tables(tables: Iterable[RenderableType]) -> None:
    """Print tables as wide as the terminal, and lines of text as long as they are."""
    # Not for --help, which stays instant.
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for one in tables:
        console.print(one, highlight=False, soft_wrap=not isinstance(one, Table), markup=False)


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_none=True)
    raise TypeError(f"{type(value).__name__} has no form in JSON")
