"""The table, the JSON beside it, and the machine they come from."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from tests.benchmarks.harness import Row

_PACKAGES = ("mergekit-arm", "mergekit", "torch", "transformers")


def machine() -> dict[str, Any]:
    """Describe the machine, without names or paths."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }


def results_table(rows: Sequence[Row], described: dict[str, Any]) -> Table:
    """Return one line for every row; the machine as its caption."""
    table = Table(
        caption=(
            sentence(described) + " Medians; in brackets the least and greatest of a single round."
        )
    )
    for heading in ("benchmark", "quantity", "measured"):
        table.add_column(heading)
    for heading in ("result", "rounds", "at most"):
        table.add_column(heading, justify="right")
    for row in rows:
        missed = row.at_most is not None and row.result > row.at_most
        shown = result(row)
        table.add_row(
            row.benchmark,
            f"{row.quantity}, exponent" if row.kind == "exponent" else row.quantity,
            measured(row),
            f"[red]{shown}[/red]" if missed else shown,
            str(len(next(iter(row.samples.values())))),
            "" if row.at_most is None else f"{row.at_most:g}",
        )
    return table


def sentence(described: dict[str, Any]) -> str:
    """Return the machine in one sentence."""
    packages = ", ".join(f"{package} {described[package]}" for package in _PACKAGES[1:3])
    return (
        f"{described['processor']}, {described['cores']} cores, {described['memory_gib']} GiB; "
        f"Python {described['python']}, {packages}."
    )


def result(row: Row) -> str:
    """Return a row's ratio or exponent, and its spread over rounds."""
    return f"{row.result:.2f} ({row.lowest:.2f}–{row.highest:.2f})"


def write_json(path: Path, rows: Sequence[Row], settings: dict[str, Any]) -> None:
    """Write everything that was measured to ``path``, beside it first and then renamed."""
    document = {"machine": machine(), **settings, "rows": [asdict(row) for row in rows]}
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def measured(row: Row) -> str:
    """Return the medians of both sides."""
    parts = [f"{label} {_amount(row, median(values))}" for label, values in row.samples.items()]
    return (" / " if row.kind == "ratio" else ", ").join(parts)


def _amount(row: Row, value: float) -> str:
    if row.unit == "MB":
        return f"{value / 1e6:,.0f} MB"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
