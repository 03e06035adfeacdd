"""Sizes and durations as people write and read them."""

from __future__ import annotations

import re

from mergekit_arm.errors import InputError

_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_size(text: str) -> int:
    """Return the bytes that ``512MB``, ``8GB`` or a plain number mean.

    Raises:
        InputError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not found:
        raise InputError(f"{text!r} is no size: write 512MB or 8GB")
    return int(float(found[1]) * _BYTES[found[2].upper()])


def parse_duration(text: str) -> float:
    """Return the seconds that ``90s``, ``5m``, ``1h`` or a plain number mean.

    Raises:
        InputError: it is no duration.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not found:
        raise InputError(f"{text!r} is no duration: write 90s, 5m or 1h")
    return float(found[1]) * _SECONDS[found[2]]


def size_text(count: float) -> str:
    """Return a number of bytes for people: ``44 MB``, ``6.7 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration_text(seconds: float) -> str:
    """Return seconds for people: ``42 s``, ``17 min``, ``2.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
