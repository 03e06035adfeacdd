"""What a search knows beside its trials: what it is, and the scores of base and inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mergekit_arm.errors import InputError
from mergekit_arm.files import write_text
from mergekit_arm.tuning.layout import STATE_FILE

TUNE_VERSION = 1


class TuneState(BaseModel):
    """All of ``tune_state.json``."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = TUNE_VERSION
    fingerprint: dict[str, str]
    scores: dict[str, dict[str, float]] = {}
    """Of the base and every input, by reference, on the evaluation sets."""
    shares: dict[str, list[dict[str, float]]] = {}
    """The same after each share of the data."""
    test: dict[str, dict[str, float]] = {}
    """On the test sets: by reference, and by the text of a configuration."""
    model: str | None = None
    """The text of the configuration that ``OUT/model`` was made of."""

    def save(self, out: Path) -> None:
        """Replace the file in ``out``; atomic and flushed."""
        write_text(out / STATE_FILE, self.model_dump_json(indent=1) + "\n")


def open_tune_state(out: Path, fingerprint: Mapping[str, str]) -> TuneState:
    """Return the state that ``out`` holds, or a new one.

    Raises:
        InputError: it is damaged, or of another search; the difference is named.
    """
    if not (out / STATE_FILE).is_file():
        return TuneState(fingerprint=dict(fingerprint))
    state = read_tune_state(
        out,
        other_version="go on with the version that began it",
        damaged="give another OUT, or --force",
    )
    for key in sorted({*state.fingerprint, *fingerprint}):
        before, now = state.fingerprint.get(key), fingerprint.get(key)
        if before != now:
            raise InputError(
                f"{out} holds another search: {key} was {before} and is now {now}; put it back, "
                "give another OUT, or --force"
            )
    return state


def read_tune_state(out: Path, *, other_version: str, damaged: str) -> TuneState:
    """Return the state that ``out`` holds.

    Args:
        out: the directory of a search.
        other_version: what to do where another version has written it.
        damaged: what to do where it cannot be read.

    Raises:
        InputError: one of these, with the remedy that is given.
    """
    file = out / STATE_FILE
    try:
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if document.get("format_version") != TUNE_VERSION:
            raise InputError(
                f"{file}: format {document.get('format_version')}, and this mergekit-arm reads "
                f"{TUNE_VERSION}: {other_version}"
            )
        return TuneState.model_validate(document)
    except (OSError, ValueError, AttributeError, ValidationError) as error:
        raise InputError(f"{file} is damaged ({type(error).__name__}); {damaged}") from error
