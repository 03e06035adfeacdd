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
    file = out / STATE_FILE
    if not file.is_file():
        return TuneState(fingerprint=dict(fingerprint))
    try:
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if document.get("format_version") != TUNE_VERSION:
            raise InputError(
                f"{file}: format {document.get('format_version')}, and this mergekit-arm reads "
                f"{TUNE_VERSION}: go on with the version that began it"
            )
        state = TuneState.model_validate(document)
    except (OSError, ValueError, ValidationError) as error:
        raise InputError(
            f"{file} is damaged ({type(error).__name__}); give another OUT, or --force"
        ) from error
    for key in sorted({*state.fingerprint, *fingerprint}):
        before, now = state.fingerprint.get(key), fingerprint.get(key)
        if before != now:
            raise InputError(
                f"{out} holds another search: {key} was {before} and is now {now}; put it back, "
                "give another OUT, or --force"
            )
    return state
