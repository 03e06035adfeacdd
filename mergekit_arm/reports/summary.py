"""The table that ends a calibration."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.table import Table

from mergekit_arm.statistics.format import Metadata


def calibration_summary(
    metadata: Metadata, out: Path, requested_sequences: int, seconds: float
) -> Table:
    """Return a table of what was measured, how fast, and what was not."""
    data = metadata.data
    reasons = Counter(weight.reason for weight in metadata.weights.values() if weight.reason)
    measured = sum(1 for weight in metadata.weights.values() if weight.site)
    size = sum(file.stat().st_size for file in out.iterdir())
    table = Table(title=f"Activation statistics of {metadata.model.reference}", show_header=False)
    table.add_row("model", f"{metadata.model.architecture}, {metadata.model.content_hash[:16]}")
    short = "" if data.sequences == requested_sequences else f" (asked for {requested_sequences})"
    table.add_row("data", f"{data.dataset}, column {data.column}")
    table.add_row("sequences", f"{data.sequences}{short}")
    table.add_row("tokens", f"{data.tokens:,} ({data.tokens / seconds:,.0f}/s)")
    table.add_row("measured", f"{measured} weights at {len(metadata.sites)} inputs")
    for reason, count in sorted(reasons.items()):
        table.add_row("not measured", f"{count} weights: {reason}")
    table.add_row("written", f"{out} ({size / 1e6:.1f} MB)")
    return table
