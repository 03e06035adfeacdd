"""Options of a calibration that stand in a YAML file: a stream's, or a merge's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter

from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.errors import did_you_mean

# What is decided where the file is used. Nobody's file may make a machine run foreign code.
NOT_IN_FILES = (
    "model", "out", "force", "dry_run", "trust_remote_code", "lora_merge_cache", "quiet",
)  # fmt: skip


def checked_settings(
    given: Mapping[str, Any], *, decided: Iterable[str] = (), beside: Iterable[str] = ()
) -> dict[str, Any]:
    """Return ``given`` as checked fields of :class:`CalibrationOptions`, defaults filled in.

    Args:
        given: what the file says.
        decided: further fields that the file may not set.
        beside: other keys that may stand there, for messages.

    Raises:
        ValueError: a key that does not exist, or a value of a wrong type.
    """
    fields = {one.name for one in dataclasses.fields(CalibrationOptions) if one.init}
    known = sorted(fields - {*NOT_IN_FILES, *decided})
    for key in given:
        if key not in known:
            raise ValueError(
                f"unknown key {key!r}{did_you_mean(str(key), [*known, *beside])}; "
                f"there are: {', '.join((*beside, *known))}"
            )
    for key in ("samples", "sequence_length", "batch_size"):
        if given.get(key) in (0, "0"):
            raise ValueError(f"{key} must be 1 or more, not 0")
    options = TypeAdapter(CalibrationOptions).validate_python({"model": "", "out": "", **given})
    return {key: getattr(options, key) for key in known}
