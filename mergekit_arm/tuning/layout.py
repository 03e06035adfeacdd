"""Names of the files in a search's directory."""

from __future__ import annotations

from pathlib import Path

from mergekit_arm.errors import InputError
from mergekit_arm.streaming.layout import LORA_CACHE
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
_OURS = (STATE_FILE, STUDY_FILE, LOCK_FILE, PREPARING, LORA_CACHE)


def check_out(out: Path) -> bool:
    """Say whether ``out`` holds a search.

    Raises:
        InputError: it is a file, or holds anything else.
    """
    if out.is_symlink() and not out.exists():
        raise InputError(f"{out} is a link that leads nowhere; make its goal, or give another OUT")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is no directory; name one for the search")
    if not out.is_dir():
        above = next(parent for parent in out.absolute().parents if parent.exists())
        if not above.is_dir():
            raise InputError(f"{out} cannot be made, for {above} is a file; give another OUT")
        return False
    if (out / STATE_FILE).is_file():
        return True
    others = sorted(path.name for path in out.iterdir() if not _begun(path.name))
    if others:
        raise InputError(
            f"{out} exists and holds no search (but {others[0]}); nothing there will be replaced: "
            "give another OUT"
        )
    return False


def _begun(name: str) -> bool:
    """Say whether this is a name that a search killed at its very start may have left."""
    return name.startswith((*_OURS, *(f".{one}." for one in _OURS), WORK))
