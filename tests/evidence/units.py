"""Units of work: each is done once, and what came out is one line of JSON that stays.

A line is appended whole, in one call, after the work. A study that was killed finds the lines of
what it had finished, and does the rest. A line that was cut short counts as not there.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.benchmarks.report import machine
from tests.support.paths import ROOT

RESULTS = Path(__file__).parent / "results"

Line = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """What a line is about. Its text is the line's ``unit``."""

    study: str
    size: str
    about: str
    """A task, or tasks with ``+`` between them."""
    seed: int
    part: str
    """``training``, ``validation``, ``sweep``, ``test``, ``generated``."""
    label: str
    """The model that was judged, or nothing."""

    def __str__(self) -> str:
        return "/".join([self.study, self.size, self.about, str(self.seed), self.part, self.label])


@dataclass(frozen=True)
class Unit:
    """A piece of work. ``compute`` may read the lines of those before it."""

    key: Key
    compute: Callable[[], Line]


class Store:
    """The lines of one study at one size, in ``folder``."""

    def __init__(self, study: str, size: str, folder: Path = RESULTS) -> None:
        self.path = folder / f"{study}-{size}.jsonl"
        commit()  # of the code that runs, which may change while it does

    def lines(self) -> dict[str, Line]:
        """Return every whole line by its unit; the last of two of the same unit counts."""
        if not self.path.is_file():
            return {}
        found = {}
        for text in self.path.read_text(encoding="utf-8").split("\n"):
            try:
                line = json.loads(text)
            except ValueError:
                continue  # cut short by a kill
            found[line["unit"]] = line
        return found

    def get(self, key: Key) -> Line | None:
        """Return the unit's line, if it is there."""
        return self.lines().get(str(key))

    def run(self, unit: Unit) -> Line:
        """Return the unit's line, doing the work if there is none."""
        known = self.get(unit.key)
        if known is not None:
            return known
        wall, processor = time.perf_counter(), time.process_time()
        result = unit.compute()
        line = {
            "unit": str(unit.key),
            **result,
            "seconds": round(time.perf_counter() - wall, 1),
            "processor_seconds": round(time.process_time() - processor, 1),
            "commit": commit(),
            "machine": machine(),
        }
        self.append(line)
        return line

    def append(self, line: Line) -> None:
        """Add a line, after ending one that a kill cut short."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n"
        cut = self.path.is_file() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, ("\n" * cut + text).encode())
            os.fsync(file)
        finally:
            os.close(file)


@cache
def commit() -> str | None:
    """Return the checkout's commit when this was first asked; None without git.

    ``+`` follows where the code differed from it.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "mergekit_arm", "tests/evidence/*.py")
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None
