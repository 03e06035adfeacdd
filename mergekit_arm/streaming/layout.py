"""Names of the files in a stream's output directory, and what of it is unfinished work.

``OUT`` holds the state, the journal, the picture, ``model`` and ``steps/NNN``, one directory a
step. Whatever is not finished has the name that it will get, with a dot before and an ending
behind it (:mod:`mergekit_arm.files` and mergekit-arm's own writers see to that).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

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
METRICS = "metrics.json"
PROVENANCE = "statistics.json"
STEP_STATISTICS = "statistics"
TASK_STATISTICS = "task_statistics"
CHECKPOINT_STATISTICS = "checkpoint_statistics"

# In a Trainer's output directory.
END_MARKER = "stream.end"

_WRITTEN = (
    *(MODEL, STATE_FILE, JOURNAL, PLOT, CARD, "removed"),
    *(STEP_CONFIG, METRICS, PROVENANCE, STEP_STATISTICS, TASK_STATISTICS, CHECKPOINT_STATISTICS),
)
# The endings are ours: a process, and eight characters of tempfile's alphabet.
_UNFINISHED = re.compile(
    rf"\.({'|'.join(map(re.escape, _WRITTEN))})\.(partial|(\d+\.)?[a-z0-9_]{{8}})"
)


def unfinished(out: Path) -> Iterator[Path]:
    """Yield what a killed stream left half-way, by the names that a stream gives such things.

    Nothing else that begins with a dot is the stream's own: a repository, settings, a cache.
    """
    for folder in (out, *out.glob(f"{STEPS}/*")):
        for path in sorted(folder.glob(".*")):
            if _UNFINISHED.fullmatch(path.name):
                yield path
    for name in (LORA_CACHE, SCRATCH, AVERAGE):
        if (out / name).exists():
            yield out / name
