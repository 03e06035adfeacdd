"""``trials.jsonl``, and ``best.yml``: an ordinary mergekit configuration."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergekit.options import MergeOptions

from mergekit_arm.merging.documents import by_hand, to_yaml
from mergekit_arm.tuning.trials import TrialRecord


def trials_text(found: Iterable[TrialRecord]) -> str:
    """Return a line for every trial."""
    return "".join(f"{json.dumps(one.model_dump(mode='json'))}\n" for one in found)


def best_text(document: Mapping[str, Any], best: TrialRecord, options: MergeOptions) -> str:
    """Return the best trial's configuration, with comments that say where it comes from."""
    gains = ", ".join(f"{name} {gain:+.4f}" for name, gain in best.gains.items())
    scores = ", ".join(f"{name} {score:.6g}" for name, score in best.scores.items())
    command = by_hand(Path("best.yml"), options, document)
    comment = [
        f"Trial {best.number} of mergekit-arm tune: {best.describe()}",
        f"Scores: {scores}",
        f"Gains, where 0 is the base and 1 the best input model: {gains}",
        f"By hand, from the directory that the paths are relative to: {command}",
    ]
    return to_yaml(document, comment)
