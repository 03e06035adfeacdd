"""What a search knows beside its trials: what it is, and the scores of base and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mergekit_arm.errors import InputError
from mergekit_arm.files import write_text
from mergekit_arm.outputs import difference, read_saved
from mergekit_arm.tuning.layout import STATE_FILE


class TuneState(BaseModel):
    """All of ``tune_state.json``."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = 1
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
    state = read_saved(out / STATE_FILE, TuneState, damaged="give another OUT, or --force")
    change = difference(state.fingerprint, fingerprint)
    if change:
        raise InputError(
            f"{out} holds another search: {change}; put it back, give another OUT, or --force"
        )
    return state
