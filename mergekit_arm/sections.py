"""YAML files of ours as checked models: how one is read, and how a mistake in it is told."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mergekit_arm.errors import InputError, did_you_mean

T = TypeVar("T")

_LONGEST = 1_000_000
"""Bytes of a file that may be a configuration."""
_MOST = 100_000
"""Values that a configuration stays below."""
_FLAG = re.compile(r"(?<!\S)--([a-z]+(?:-[a-z]+)*)")


class Section(BaseModel):
    """A part of a file: no other keys than its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@contextmanager
def section(name: str) -> Iterator[None]:
    """Put ``name`` before what is refused inside, and keys where ``calibrate`` has flags.

    Raises:
        InputError: the same, reworded.
    """
    try:
        yield
    except InputError as error:
        message = _FLAG.sub(lambda flag: flag[1].replace("-", "_"), error.message)
        raise InputError(f"{name}: {message}") from error


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]  # yaml is untyped
    """YAML, where one key twice is a mistake and not the second value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = next((key for key, times in keys.items() if times > 1 and key != "<<"), None)
        if twice is not None:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"the key {twice} stands twice in the mapping of line {line}")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read_configuration(path: Path) -> str:
    """Return the text of a YAML file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not text in UTF-8, or longer than any configuration.
    """
    with path.open("rb") as file:  # no more of it than that: it may be a device, or a model
        content = file.read(_LONGEST + 1)
    if len(content) > _LONGEST:
        raise ValueError(f"it is longer than {_LONGEST:,} bytes")
    return content.decode()


def check_aliases(node: yaml.Node) -> None:
    """Check that a YAML node, every alias written out, is no larger than any configuration.

    Raises:
        yaml.YAMLError: it is, or an alias stands within what it names.
    """
    sizes: dict[int, int] = {}

    def size_of(one: yaml.Node) -> int:
        if id(one) not in sizes:
            sizes[id(one)] = _MOST  # as long as it is not known: then it holds itself
            inner = one.value if isinstance(one, yaml.CollectionNode) else ()
            parts = [part for two in inner for part in (two if isinstance(two, tuple) else (two,))]
            sizes[id(one)] = 1 + sum(map(size_of, parts))
        return sizes[id(one)]

    if size_of(node) >= _MOST:
        raise yaml.YAMLError(f"its aliases make {_MOST:,} values and more of it")


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        InputError: it cannot be read, is no YAML, has a key twice, or holds no mapping.
    """
    try:
        loader = _UniqueKeys(read_configuration(path))
        node = loader.get_single_node()
        if node is not None:
            check_aliases(node)
        document = None if node is None else loader.construct_document(node)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name the YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not YAML ({problem}); mend the file") from error
    if not isinstance(document, Mapping):
        raise InputError(f"{path}: must be a mapping that starts with merge_method, base_model …")
    for key in document:
        if not isinstance(key, str):
            raise InputError(
                f"{path}: the key {key!r} is no word; write merge_method, base_model …"
            )
    return dict(document)


def explain(error: ValidationError, known: Mapping[str, Iterable[str]]) -> str:
    """Return the first mistake as ``place: what is wrong``.

    ``known``: a place's dotted name (``""`` is the whole) → the keys that it may have.
    """
    errors = error.errors()
    # A misspelt key also leaves the right one missing: name the cause.
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    place = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        outer = ".".join(place[:-1])
        keys = list(known.get(outer, ()))
        inside = f" in {outer}" if outer else ""
        there = f"; there are: {', '.join(keys)}" if keys else ""
        return f"unknown key {place[-1]!r}{inside}{did_you_mean(place[-1], keys)}{there}"
    message = first["msg"].removeprefix("Value error, ")
    # The names of a union's branches say nothing to the user.
    path = ".".join(part for part in place if "[" not in part and part not in ("str", "int"))
    return f"{path}: {message[:1].lower()}{message[1:]}" if path else message


def read_checked(
    source: Mapping[str, Any] | str | Path,
    check: Callable[[dict[str, Any]], T],
    known: Mapping[str, Iterable[str]],
) -> T:
    """Return what ``check`` makes of a mapping, or of what the YAML file of this name holds.

    What it refuses, by pydantic too, names the file; ``known`` is for :func:`explain`.

    Raises:
        InputError: one line: the first thing that is wrong, where, and what to write instead.
    """
    where = "configuration" if isinstance(source, Mapping) else str(source)
    document = dict(source) if isinstance(source, Mapping) else read_mapping(Path(source))
    try:
        return check(document)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, known)}") from error
    except InputError as error:
        raise InputError(f"{where}: {error.message}") from error
