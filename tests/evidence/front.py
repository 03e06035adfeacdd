"""The tables of README.md: what a user asks first, of size small, over all runs that are there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mergekit_arm.merging.card import table
from tests.evidence.differences import Group, apart, over_runs, spread, volumes_apart
from tests.support.paths import ROOT

README = ROOT / "README.md"
BEGIN, END = "<!-- evidence: python -m tests.evidence.tables -->\n", "<!-- /evidence -->\n"

TUNED = "task_arithmetic"
STREAMS = {
    "base": "the base",
    "best checkpoint": "best single checkpoint",
    "linear to late": "linear, late",
    "arm to late, leading direction alone, ρ = -1.0": "`arm`, late",
    "arm to late, task_stats, κ = 0.3": "`arm`, `task_stats`, late",
}
SPECIALISTS = {
    "arm": "`arm`",
    "aim_task_arithmetic, weights from 0.4": "`aim`",
    "regmean": "`regmean`",
    "regmean, κ = 1": "`regmean`, `retain: 1`",
}
"""Label → what it is called there."""


def tables(streams: Mapping[str, Group], specialists: Mapping[str, Group]) -> str:
    """Return both tables as Markdown."""
    head = ["loss", "surely lower / higher", "exact", "general text"]
    first = table(
        ["merged checkpoints, less the converged model", *head],
        [_cells(streams, label, "100 %", name) for label, name in STREAMS.items()],
    )
    pairs = {name: group for name, group in specialists.items() if name.count("+") == 1}
    second = table(
        ["two specialists, less task arithmetic", *head, "hypervolume larger"],
        [
            [*_cells(pairs, label, TUNED, name), _larger(volumes_apart(pairs, label, TUNED))]
            for label, name in SPECIALISTS.items()
        ],
    )
    return f"{first}\n\n{second}\n"


def put(text: str, page: Path = README) -> str:
    """Return the page with ``text`` between its two marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{page} has no place for the tables")
    return before + BEGIN + text + END + after


def _cells(groups: Mapping[str, Group], label: str, reference: str, name: str) -> list[str]:
    found = over_runs(groups, label, reference)
    surely = sum(one.high < 0 for one in found), sum(one.low > 0 for one in found)
    return [
        name,
        spread([one.mean for one in found]),
        f"{surely[0]} / {surely[1]} of {len(found)}",
        *(spread(apart(groups, label, reference, one)) for one in ("exact", "general")),
    ]


def _larger(differences: list[float]) -> str:
    return f"{sum(one > 0 for one in differences)} of {len(differences)}"
