"""The demo's stream: early checkpoints of one specialist's training, merged one after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from mergekit.options import MergeOptions

from mergekit_arm.streaming import StreamOptions, StreamResult, stream
from mergekit_arm.streaming.state import StepRecord

DOMAIN = "prose"
"""The specialist whose training is streamed."""

RUN = Path("runs") / DOMAIN
STREAM_CONFIG = Path("configs") / "stream.yml"
OUT = Path("streamed")
EARLY = (0.1, 0.2, 0.3, 0.4)
"""Parts of the training after which a checkpoint is kept."""


def stream_config() -> dict[str, Any]:
    """Return the stream's configuration, paths relative to the demo's directory."""
    return {
        "merge_method": "arm",
        "base_model": "./base",
        "checkpoints": f"./{RUN}",
        "learning_rate": 0.6,
        "calibration": {"dataset": "calibration.jsonl", "samples": 64, "sequence_length": 128},
        "evaluation": {
            "dataset": f"validation/{DOMAIN}.jsonl",
            "samples": 64,
            "sequence_length": 128,
            "keep": "best",
        },
        "dtype": "float32",
    }


def early_steps(steps: int) -> set[int]:
    """Return after which of ``steps`` training steps a checkpoint is kept."""
    return {max(1, round(part * steps)) for part in EARLY}


def run_stream(on_step: Callable[[StepRecord], None] | None = None) -> StreamResult:
    """Stream inside the demo's directory, which must be the current one.

    Writes ``configs/stream.yml`` and ``streamed``: the model, ``stream.jsonl``, ``stream.png``.
    """
    STREAM_CONFIG.parent.mkdir(exist_ok=True)
    STREAM_CONFIG.write_text(yaml.safe_dump(stream_config(), sort_keys=False), encoding="utf-8")
    return stream(STREAM_CONFIG, OUT, StreamOptions(MergeOptions(quiet=True)), on_step=on_step)
