"""The table that ends a calibration."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from mergekit_arm.data.blocks import Corpus
from mergekit_arm.statistics.format import Metadata
from mergekit_arm.statistics.kinds import chosen
from mergekit_arm.statistics.kinds.base import LEFT_OUT
from mergekit_arm.units import size_text

_STARVED_SHOWN = 5


def calibration_summary(metadata: Metadata, out: Path, corpus: Corpus, seconds: float) -> Table:
    """Return a table of what was measured, how fast, and what was not."""
    data = metadata.data
    reasons = Counter(weight.reason for weight in metadata.weights.values() if weight.reason)
    measured = sum(1 for weight in metadata.weights.values() if weight.site)
    size = sum(file.stat().st_size for file in out.iterdir())
    table = Table(title=f"Activation statistics of {metadata.model.reference}", show_header=False)
    table.add_row("model", f"{metadata.model.architecture}, {metadata.model.content_hash[:16]}")
    short = "" if data.sequences == corpus.requested else f" (asked for {corpus.requested})"
    table.add_row("data", escape(f"{data.dataset}, column {data.column}"))
    for note in corpus.notes:
        table.add_row("rows", escape(note))
    table.add_row("sequences", f"{data.sequences}{short}")
    table.add_row("tokens", f"{data.tokens:,} ({data.tokens / seconds:,.0f}/s)")
    table.add_row("measured", f"{measured} weights at {len(metadata.sites)} inputs")
    for reason, count in sorted(reasons.items()):
        table.add_row("not measured", f"{count} weights: {reason}")
    for kind in chosen(metadata.settings.statistics):
        reasons_here = Counter(
            kind.from_record(metadata.sites[weight.site]).get(LEFT_OUT)
            for weight in metadata.weights.values()
            if weight.site
        )
        for reason, count in sorted((r, c) for r, c in reasons_here.items() if r):
            table.add_row(f"without {kind.name}", f"{count} weights: {reason}")
    table.add_row("coverage", f"{measured + reasons.total()} of {len(metadata.weights)} weights")
    if experts := metadata.experts():
        counts = sorted(experts.values())
        middle = counts[len(counts) // 2]
        table.add_row(
            "experts",
            f"{len(experts)}, tokens seen: least {counts[0]:,}, median {middle:,}, "
            f"most {counts[-1]:,}",
        )
        few = max(metadata.settings.min_expert_tokens, 1)
        starved = {name: tokens for name, tokens in experts.items() if tokens < few}
        if starved:
            least = sorted(starved.items(), key=lambda item: item[1])[:_STARVED_SHOWN]
            names = ", ".join(f"{name} ({tokens:,})" for name, tokens in least)
            more = ", …" if len(starved) > len(least) else ""
            table.add_row(
                "starved",
                f"{len(starved)} experts saw fewer than {few} tokens, too few to be used: aim "
                "leaves them as merged, regmean gives this model no say in them: "
                f"{names}{more}",
                style="yellow",
            )
    table.add_row("written", f"{out} ({size_text(size)})")
    return table
