"""Whose fault it is: errors under the name of the YAML's section that they are about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mergekit_arm.errors import InputError

_FLAG = re.compile(r"(?<!\S)--([a-z]+(?:-[a-z]+)*)")


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
