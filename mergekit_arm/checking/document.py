"""A YAML file as mergekit reads it, and the line on which everything in it stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mergekit_arm.errors import InputError, first_line
from mergekit_arm.merging.keys import Place as Place
from mergekit_arm.merging.keys import dotted as dotted
from mergekit_arm.sections import check_aliases, read_configuration


@dataclass
class Document:
    """One YAML document."""

    file: str
    value: Any
    """What ``yaml.safe_load`` makes of it."""
    lines: dict[Place, int] = field(default_factory=dict)
    """Of every key and item, from 1."""
    duplicates: list[tuple[Place, int]] = field(default_factory=list)
    """Keys that stand in their mapping again, and the line of the first, which is lost."""

    def line(self, place: Place) -> int:
        """Return the line of ``place``, or of what it lies in."""
        while place not in self.lines and place:
            place = place[:-1]
        return self.lines.get(place, 1)

    def leaves(self) -> Iterator[tuple[Place, Any]]:
        """Yield every scalar with its place."""
        yield from _leaves((), self.value)


def read_documents(path: str | Path) -> list[Document]:
    """Return every document of the file at ``path``.

    Raises:
        InputError: it cannot be read, or is no YAML.
    """
    try:
        text = read_configuration(Path(path))
        return [_document(str(path), node, loader) for loader, node in _nodes(text)]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name the configuration's file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise InputError(f"{path}{line}: not YAML ({problem}); mend the file") from error


def _nodes(text: str) -> Iterator[tuple[yaml.SafeLoader, yaml.Node]]:
    loader = yaml.SafeLoader(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            check_aliases(node)
            yield loader, node
    finally:
        loader.dispose()


def _document(file: str, node: yaml.Node, loader: yaml.SafeLoader) -> Document:
    document = Document(file, None)
    _walk(document, (), node, loader)
    document.value = loader.construct_document(node)
    return document


def _walk(document: Document, place: Place, node: yaml.Node, loader: yaml.SafeLoader) -> None:
    document.lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _walk(document, (*place, number), item, loader)
    elif isinstance(node, yaml.MappingNode):
        written: dict[Any, int] = {}
        for key, _ in node.value:
            name = getattr(key, "value", None)
            if not isinstance(name, str) or key.tag.endswith(":merge"):
                continue
            line = key.start_mark.line + 1
            if name in written:
                document.duplicates.append(((*place, name), written[name]))
            written[name] = line
        loader.flatten_mapping(node)  # what ``<<`` merges in, as safe_load does
        for key, value in node.value:
            name = loader.construct_object(key, deep=True)
            if isinstance(name, str | int):
                inner = (*place, name)
                document.lines[inner] = written.get(name, key.start_mark.line + 1)
                _walk(document, inner, value, loader)


def _leaves(place: Place, value: Any) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves((*place, key), inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves((*place, number), inner)
    else:
        yield place, value
