"""The tables of README.md: what a user asks first, of size small, over all runs that are there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.evidence.differences import Group, mean_of, over_runs, spread
from tests.evidence.hypervolume import gains
from tests.support.paths import ROOT

README = ROOT / "README.md"
BEGIN, END = "<!-- evidence: python -m tests.evidence.tables -->\n", "<!-- /evidence -->\n"

STREAMS = {
    "base": "the base",
    "best checkpoint": "best single checkpoint",
    "linear to early": "linear, early",
    "linear to late": "linear, late",
    "arm to late, general text, ρ = -0.7": "`arm`, late",
    "arm to late, task_stats, κ = 0.3": "`arm`, `task_stats`, late",
}
SPECIALISTS = {
    "aim_task_arithmetic, weights from 0.4": "`aim`",
    "regmean": "`regmean`",
    "regmean, κ = 1": "`regmean`, `retain: 1`",
}
"""Label → what it is called there."""


def tables(streams: Mapping[str, Group], specialists: Mapping[str, Group]) -> str:
    """Return both tables as Markdown."""
    head = ["loss", "surely lower / higher", "exact", "general text"]
    apart = ["merged checkpoints, less the converged model", *head]
    rows = [_cells(streams, label, "100 %", name) for label, name in STREAMS.items()]
    text = _markdown(apart, rows)
    pairs = {name: group for name, group in specialists.items() if name.count("+") == 1}
    apart = ["two specialists, less task arithmetic", *head, "hypervolume larger"]
    rows = [
        [*_cells(pairs, label, "task_arithmetic", name), larger_volume(pairs, label)]
        for label, name in SPECIALISTS.items()
    ]
    return f"{text}\n{_markdown(apart, rows)}"


def larger_volume(pairs: Mapping[str, Group], label: str, than: str = "task_arithmetic") -> str:
    """Return in how many pairs a merge's hypervolume gain is larger than another's."""
    found = [gains(group, name.partition(",")[0].split("+")) for name, group in pairs.items()]
    both = [one for one in found if label in one and than in one]
    return f"{sum(one[label] > one[than] for one in both)} of {len(both)}"


def put(text: str, page: Path = README) -> str:
    """Return the page with ``text`` between its two marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{page} has no place for the tables")
    return before + BEGIN + text + END + after


def _cells(groups: Mapping[str, Group], label: str, reference: str, name: str) -> list[str]:
    both = [group for group in groups.values() if label in group and reference in group]
    found = over_runs(groups, label, reference)
    cells = [name, spread([one.mean for one in found])]
    surely = sum(one.high < 0 for one in found), sum(one.low > 0 for one in found)
    cells.append(f"{surely[0]} / {surely[1]} of {len(found)}")
    for quantity in ("exact", "general"):
        moved = [mean_of(one[label], quantity) - mean_of(one[reference], quantity) for one in both]
        cells.append(spread(moved))
    return cells


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(one)} |\n" for one in lines)
