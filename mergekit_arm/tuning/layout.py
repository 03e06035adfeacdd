"""Names of the files in a search's directory."""

from __future__ import annotations

from pathlib import Path

from mergekit_arm.errors import InputError
from mergekit_arm.merging.options import LORA_CACHE
from mergekit_arm.outputs import holds
from mergekit_arm.tuning.search import LOCK_FILE, STUDY_FILE

STATE_FILE = "tune_state.json"
BEST = "best.yml"
MODEL = "model"
CARD = "README.md"
TRIALS = "trials.jsonl"
PLOT = "tune.png"
METRIC_LOG = "metric.log"
WORK = ".work"
"""Begins the names of what one process has in hand; its number follows."""
PREPARING = ".preparing.lock"
_OURS = (STUDY_FILE, LOCK_FILE, PREPARING, LORA_CACHE)
_BEGUN = (*_OURS, *(f".{one}." for one in _OURS), WORK)
"""How names begin that a search killed at its very start may have left."""


def check_out(out: Path) -> bool:
    """Say whether ``out`` holds a search.

    Raises:
        InputError: it is a file, holds anything else, or has a name that no study can have.
    """
    if "?" in str(out.absolute()):
        raise InputError(f"{out}: the address of a study cannot hold a ?; give another OUT")
    return holds(out, "search", STATE_FILE, _BEGUN)
