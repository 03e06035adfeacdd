"""What unknowns are called that the user gave no name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Path = tuple[str | int, ...]
"""Keys and indices from the top of the document to a place in it."""


def describe_place(document: Mapping[str, Any], place: Path) -> str:
    """Return a name for a value under ``parameters``, such as ``weight of code, mlp``."""
    index = place.index("parameters")
    name = str(place[index + 1])
    notes = []
    node: Any = document
    for depth, key in enumerate(place):
        if depth > index and isinstance(node, Mapping) and node.get("filter"):
            notes.append(str(node["filter"]))
        if depth > index and isinstance(key, int) and not _is_filter(node[key]):
            notes.append(f"point {key}")
        if depth == index and isinstance(node, Mapping) and "model" in node:
            model = str(node["model"])
            name += f" of {short_names({model, *model_names(document)})[model]}"
        node = node[key]
    return ", ".join([name, *notes])


def short_names(references: Iterable[str]) -> dict[str, str]:
    """Return for each reference the fewest last parts of its path that no other ends with."""
    parts = {one: one.rstrip("/").split("/") for one in references}

    def tail(one: str, count: int) -> str:
        return "/".join(parts[one][-count:])

    found = {}
    for one, its in parts.items():
        counts = range(1, len(its) + 1)
        others = [other for other in parts if other != one]
        unique = (n for n in counts if all(tail(other, n) != tail(one, n) for other in others))
        found[one] = tail(one, next(unique, len(its)))
    return found


def model_names(node: Any) -> Iterator[str]:
    """Yield the models that a configuration lists, in its order, as often as it does."""
    if isinstance(node, Mapping):
        if isinstance(node.get("model"), str):
            yield node["model"]
        for key, value in node.items():
            if key not in ("parameters", "tokenizer"):
                yield from model_names(value)
    elif isinstance(node, list):
        for value in node:
            yield from model_names(value)


def _is_filter(node: Any) -> bool:
    return isinstance(node, Mapping) and "value" in node
