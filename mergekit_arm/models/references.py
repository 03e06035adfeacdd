"""References to models in mergekit's grammar, with local paths made absolute.

What a stream or a search writes names models from directories of its own, where a relative path
would mean something else.
"""

from __future__ import annotations

import os
from pathlib import Path

from mergekit.common import ModelReference
from pydantic import ValidationError

from mergekit_arm.errors import InputError, first_line


def absolute_reference(reference: str) -> str:
    """Return ``reference`` in mergekit's grammar with local paths made absolute.

    Raises:
        InputError: it does not parse, or its absolute path would not.
    """
    try:
        parsed = ModelReference.parse(reference)
    except (ValidationError, RuntimeError) as error:
        raise InputError(
            f"model {reference!r} does not parse ({first_line(error)}): "
            "expected a directory, a Hub id, id@revision or model+lora"
        ) from error
    parts = []
    for part in (parsed.model, parsed.lora):
        if part is None:
            continue
        if os.path.exists(part.path) and part.revision is None:
            parts.append(plain_path(part.path))
        else:
            parts.append(str(part))
    return "+".join(parts)


def plain_path(path: str | Path) -> str:
    """Return the absolute path, if mergekit's grammar can express it.

    Raises:
        InputError: it contains + or @.
    """
    absolute = os.path.abspath(os.path.expanduser(path))
    if "+" in absolute or "@" in absolute:
        raise InputError(
            f"{absolute}: mergekit reads + and @ in a path as adapter and revision; "
            "use a directory without them"
        )
    return absolute
