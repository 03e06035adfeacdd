"""Keys of a configuration that nothing reads: mergekit passes over them without a word."""

from __future__ import annotations

import types
from collections.abc import Container, Iterator
from typing import Any, Union, get_args, get_origin

from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration
from pydantic import BaseModel

from mergekit_arm.errors import InputError, did_you_mean

Place = tuple[str | int, ...]
"""Keys and indices from the top: ``("models", 0, "parameters", "weight")``."""


def dotted(place: Place) -> str:
    """Return ``models[0].parameters.weight``."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def unread_keys(kind: Any, value: Any, place: Place) -> Iterator[tuple[Place, str, list[str]]]:
    """Yield every key of ``value`` that the type ``kind`` has no field for."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if not isinstance(value, dict):
            return
        fields = kind.model_fields
        for key, inner in value.items():
            if key in fields:
                yield from unread_keys(fields[key].annotation, inner, (*place, key))
            else:
                yield place, key, list(fields)
        return
    arguments = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        yield from unread_keys(_meant(arguments, value), value, place)
    elif isinstance(value, list) and arguments:
        for number, inner in enumerate(value):
            yield from unread_keys(arguments[0], inner, (*place, number))
    elif isinstance(value, dict) and len(arguments) == 2:
        for key, inner in value.items():
            yield from unread_keys(arguments[1], inner, (*place, key))


def refuse_unread(document: Any, passed_over: Container[str] = ()) -> None:
    """Refuse the first key of a configuration that mergekit would pass over.

    Args:
        document: a merge configuration.
        passed_over: keys that may stand anywhere below the top, where no field has them.

    Raises:
        InputError: the key, its place, and what may stand there.
    """
    for place, unread, known in unread_keys(MergeConfiguration, document, ()):
        if place and unread in passed_over:
            continue
        where = dotted(place) or "configuration"
        raise InputError(
            f"{where}: mergekit knows no key {unread!r} here{did_you_mean(str(unread), known)}; "
            f"there are: {', '.join(known)}"
        )


def _meant(kinds: tuple[Any, ...], value: Any) -> Any:
    """Return which member of a union a value is of: the model with most of its keys, or the list.

    A list of ``{filter, value}`` and a single one are two members of mergekit's settings.
    """
    if isinstance(value, list):
        lists = [kind for kind in kinds if get_origin(kind) is list]
        filters = [kind for kind in lists if ConditionalParameter in get_args(kind)]
        return (filters or lists or [None])[0]
    if not isinstance(value, dict):
        return None
    models = [one for kind in kinds for one in _models(kind)]
    if not models:
        return next((kind for kind in kinds if get_origin(kind) is dict), None)
    if ModelReference in models and "model" in value and "kind" not in value:
        return ModelReference
    return max(models, key=lambda one: len(one.model_fields.keys() & value.keys()))


def _models(kind: Any) -> list[Any]:
    return [kind] if isinstance(kind, type) and issubclass(kind, BaseModel) else []
