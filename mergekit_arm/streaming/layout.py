"""Names of the files in a stream's output directory."""

from __future__ import annotations

INCOMING = "incoming"


END_MARKER = "stream.end"


MODEL = "model"


STATISTICS = "statistics"


CHECKPOINT_STATISTICS = "checkpoint_statistics"


CONFIG = "config.yml"


METRICS = "metrics.json"


PROVENANCE = "statistics.json"


JOURNAL = "stream.jsonl"


PLOT = "stream.png"


LORA_CACHE = ".adapters"


SCRATCH = ".scratch"


STATE_FILE = "stream_state.json"


LOCK_FILE = ".lock"


BEFORE_STATE = (LOCK_FILE, INCOMING)
"""What may lie in OUT before the state: the lock, and checkpoints a callback has taken."""
