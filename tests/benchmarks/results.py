"""``python -m tests.benchmarks.results`` writes RESULTS.md from the measurements in ``results/``.

Each file there is what ``python -m tests.benchmarks NAMES --out FILE.json`` wrote. Where two hold
the same benchmark, the later file, by its name, counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import Row
from tests.benchmarks.report import measured, result, sentence

FOLDER = Path(__file__).parent
MEASUREMENTS = FOLDER / "results"
PAGE = FOLDER / "RESULTS.md"

_HEAD = """# Measurements

Written by `python -m tests.benchmarks.results` from the files in [`results/`](results), not by
hand. `python -m tests.benchmarks NAME --out FILE.json` measures again. Two sides are run in turn,
each in a process of its own; a result is the ratio of their medians, with the least and the
greatest ratio of a single round in brackets. *At most* is what the benchmark asks for; a result
beyond it is bold.
"""


def page() -> str:
    """Return RESULTS.md: one table for each file of measurements, the newest first."""
    parts, seen = [_HEAD], set[str]()
    for path in sorted(MEASUREMENTS.glob("*.json"), reverse=True):
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in document["rows"]]
        fresh = [row for row in rows if row.benchmark not in seen]
        seen |= {row.benchmark for row in rows}
        if fresh:
            parts.append(_table(path.stem, document, fresh))
    return "\n".join(parts)


def _table(title: str, document: dict[str, Any], rows: list[Row]) -> str:
    load = max(document.get("load", {}).values(), default=0.0)
    lines = [
        f"## {title}",
        "",
        f"{sentence(document['machine'])} Highest load of the machine before a benchmark: {load}.",
        "",
        "| benchmark | quantity | measured | result | rounds | at most |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        quantity = f"{row.quantity}, exponent" if row.kind == "exponent" else row.quantity
        missed = row.at_most is not None and row.result > row.at_most
        shown = f"**{result(row)}**" if missed else result(row)
        rounds = len(next(iter(row.samples.values())))
        limit = "" if row.at_most is None else f"{row.at_most:g}"
        lines.append(
            f"| {row.benchmark} | {quantity} | {measured(row)} | {shown} | {rounds} | {limit} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
