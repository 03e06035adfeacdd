"""Names of the files in a stream's output directory, and what of it is unfinished work.

``OUT`` holds the state, the journal, the picture, ``model`` and ``steps/NNN``, one directory a
step.
"""

from __future__ import annotations

from pathlib import Path

from mergekit_arm.files import unfinished
from mergekit_arm.merging.options import LORA_CACHE

MODEL = "model"
"""Of a step: its float32 weights. Of ``OUT``: the final model."""

# In OUT.
STEPS = "steps"
STATE_FILE = "stream_state.json"
JOURNAL = "stream.jsonl"
PLOT = "stream.png"
CARD = "README.md"
"""It lies in the final model; until it is whole, it is written in ``OUT``."""
INCOMING = "incoming"
METRIC_LOG = "metric.log"
"""What the last metric command printed."""
AVERAGE = ".average"
LOCK_FILE = ".lock"
SCRATCH = ".scratch"
BEFORE_STATE = (LOCK_FILE, INCOMING)
"""What may lie in OUT before the state: the lock, and checkpoints a callback has taken."""

# In a step's directory.
STEP_CONFIG = "config.yml"
PROVENANCE = "statistics.json"
STEP_STATISTICS = "statistics"
TASK_STATISTICS = "task_statistics"
CHECKPOINT_STATISTICS = "checkpoint_statistics"

# In a Trainer's output directory.
END_MARKER = "stream.end"

_WRITTEN = (
    MODEL, STATE_FILE, JOURNAL, PLOT, CARD,
    STEP_CONFIG, PROVENANCE, STEP_STATISTICS, TASK_STATISTICS, CHECKPOINT_STATISTICS,
)  # fmt: skip


def step_folder(out: Path, step: int) -> Path:
    """Return the directory of a step (from 1)."""
    return out / STEPS / f"{step:03d}"


def left_behind(out: Path) -> list[Path]:
    """Return what a killed stream left half-way."""
    folders = (out, *out.glob(f"{STEPS}/*"))
    found = [path for folder in folders for path in unfinished(folder, _WRITTEN)]
    whole = (out / name for name in (LORA_CACHE, SCRATCH, AVERAGE))
    return [*found, *(path for path in whole if path.exists())]
