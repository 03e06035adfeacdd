"""Long runs: memory stays flat, no file stays open, and sums are exact.

Each runs in a process of its own: what other tests left behind would hide growth, or look like it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from mergekit_arm.calibration.calibrate import CalibrationOptions, calibrate
from mergekit_arm.streaming import stream
from mergekit_arm.tuning import TuneOptions, tune
from tests.support import streams, tuning
from tests.support.memory import memory_held
from tests.support.models import VOCABULARY, tiny_llama
from tests.support.stored import Folder

pytestmark = pytest.mark.long

MB = 1_000_000
ROWS, TOKENS, REPEATS = 100, 128, 782
"""Distinct rows, tokens in each, and how often each row stands in the data: 10⁷ tokens."""
STEPS = TRIALS = 200
SMALL = MB / 20
"""Bytes by which a step or a trial may let memory grow. Their records stay, which a stream's
journal and a search's sampler need: theirs alone of all objects become more, and 31 kB a step were
measured. A figure that is kept until Python collects its garbage would be 5 MB, and mergekit's plan
of a merge 0.1 MB on this model."""

Held = list[tuple[int, int, int]]
"""What has been done, the bytes that are this process's alone, and the open files."""


class Looks:
    """Writes down what this process holds, at every ``every``-th call."""

    def __init__(self, every: int = 1) -> None:
        self.held: Held = []
        self._process, self._every, self._calls = psutil.Process(), every, 0

    def look(self, done: int) -> None:
        self._calls += 1
        if self._calls % self._every == 0:
            self.held.append((done, memory_held(), self._process.num_fds()))


def calibration(folder: Path) -> Held:
    looks = Looks(every=20)
    options = CalibrationOptions(
        str(folder / "base"), str(folder / "stats"), str(folder / "rows.jsonl"),
        samples=ROWS * REPEATS, statistics=("importance",),
    )  # fmt: skip
    calibrate(options, lambda tokens, total: looks.look(tokens // TOKENS))
    return looks.held


def streaming(folder: Path) -> Held:
    looks = Looks()
    document = streams.config(
        folder, passes=STEPS // 2, evaluation={"dataset": str(folder / "heldout.jsonl")}
    )
    stream(document, folder / "out", on_step=lambda record: looks.look(len(looks.held) + 1))
    return looks.held


def searching(folder: Path) -> Held:
    looks = Looks()
    sets = {"one": {"dataset": str(folder / "one.jsonl")}}
    document = tuning.config(folder, {"evaluation": sets, "sampler": "random"})
    options = TuneOptions(trials=TRIALS, model=False)
    tune(
        document, folder / "out", options, on_trial=lambda *_: looks.look(len(looks.held) + 1)
    )  # fmt: skip
    return looks.held


def apart(run: Callable[[Path], Held], folder: Path) -> Held:
    """Return what a run held, in a process of its own."""
    script = (
        "import json, sys; from pathlib import Path; from tests.faults import test_long_runs;"
        f"print(json.dumps(test_long_runs.{run.__name__}(Path(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    held: Held = json.loads(done.stdout.splitlines()[-1])
    return held


def slope(held: Held) -> float:
    """Return by how many bytes memory grows for each thing done, once a fifth of all is."""
    settled = np.array(held[len(held) // 5 :], dtype=np.float64)
    return float(np.polyfit(settled[:, 0], settled[:, 1], 1)[0])


def assert_flat(held: Held, growth: float, name: str) -> None:
    """``growth``: bytes for each thing done that are allowed."""
    middle, end = held[len(held) // 2], held[-1]
    print(  # noqa: T201  what pytest -s shows
        f"{name}: {end[0]} done; {slope(held):+.0f} bytes for each; {middle[1] / MB:.0f} MB half "
        f"way and {end[1] / MB:.0f} MB at the end; {middle[2]} and {end[2]} open files"
    )
    assert slope(held) < growth
    assert end[2] <= middle[2]


def test_ten_million_tokens(tmp_path: Path) -> None:
    tiny_llama(0).save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator).tolist()
    text = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows)
    (tmp_path / "once.jsonl").write_text(text)
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.writelines(text for _ in range(REPEATS))
    held = apart(calibration, tmp_path)
    assert_flat(held, MB / 1000, "blocks of a calibration")
    once: dict[str, Any] = {"samples": ROWS, "statistics": ("importance",)}
    calibrate(
        CalibrationOptions(
            str(tmp_path / "base"), str(tmp_path / "less"), str(tmp_path / "once.jsonl"), **once
        )
    )
    long, short = Folder.open(tmp_path / "stats"), Folder.open(tmp_path / "less")
    assert long.metadata["data"]["tokens"] == ROWS * TOKENS * REPEATS > 10**7
    for name, site in long.metadata["sites"].items():
        assert site["tokens"] == ROWS * TOKENS * REPEATS
        for key in ("abs_sum", "square_sum"):
            many, few = (one.tensors[f"{name}.{key}"].double() for one in (long, short))
            # A float32 that adds ten million numbers up would be off by a thousandth.
            torch.testing.assert_close(many, few * REPEATS, rtol=1e-6, atol=0)


def test_a_stream_of_two_hundred_steps(tmp_path: Path) -> None:
    streams.write_run(tmp_path, (1, 2))
    streams.write_tokens(tmp_path / "heldout.jsonl", 3, rows=2)
    held = apart(streaming, tmp_path)
    assert len(held) == STEPS
    assert_flat(held, SMALL, "steps of a stream")


def test_a_search_of_two_hundred_trials(tmp_path: Path) -> None:
    tuning.write_family(tmp_path)
    held = apart(searching, tmp_path)
    assert len(held) >= TRIALS
    assert_flat(held, SMALL, "trials of a search")
