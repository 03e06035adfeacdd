"""What cards of merged models have in common: the front matter, tables, no path of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mergekit_arm.files import is_path

_PATH = re.compile(r"""(?:(?<=^)|(?<=[\s='"(+:,<>|&;`[{]))(?:~|\.{1,2})?/[^\s'"|;&)+:,]+""")


def front_matter(models: Iterable[str]) -> str:
    """Return a card's YAML, which names those of ``models`` that the Hub may have as its bases."""
    front: dict[str, object] = {"library_name": "transformers"}
    # The Hub refuses a card whose base_model is not a repository's name.
    names = [one.split("+")[0].split("@")[0] for one in models]
    hub = [name for name in names if not (is_path(name) or Path(name).exists())]
    if hub:
        front["base_model"] = hub
    front["tags"] = ["mergekit", "merge", "mergekit-arm"]
    return str(yaml.safe_dump(front, sort_keys=False))


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def numbers(scores: Mapping[str, float], names: Iterable[str]) -> list[str]:
    """Return the scores of these names for a table, empty where there is none."""
    return [f"{scores[name]:.4f}" if name in scores else "" for name in names]


def without_paths(document: Any) -> Any:
    """Return a configuration in which directories and files of this machine are their names."""
    if isinstance(document, dict):
        keep = ("chat_template",)
        return {k: v if k in keep else without_paths(v) for k, v in document.items()}
    if isinstance(document, list):
        return [without_paths(value) for value in document]
    return name_of(document) if isinstance(document, str) else document


def name_of(text: str) -> str:
    """Return ``text`` with every path in it cut to its last part."""
    return _PATH.sub(lambda path: Path(path[0]).name, text)
