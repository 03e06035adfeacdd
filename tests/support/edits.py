"""Statistics directories that somebody changed, and those that were written before digests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def edit(stats: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    """Change the metadata at ``stats`` and take the digests out, as one who means it would."""
    file = stats / "activation_stats.json"
    metadata = json.loads(file.read_text(encoding="utf-8"))
    metadata.pop("digest", None)
    metadata.pop("digests", None)
    change(metadata)
    file.write_text(json.dumps(metadata), encoding="utf-8")
    return stats
