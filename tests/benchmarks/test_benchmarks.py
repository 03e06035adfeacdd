"""Every benchmark runs and yields rows, on tiny inputs. Nothing here asserts a time."""

from __future__ import annotations

import json
import math
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.benchmarks import results
from tests.benchmarks.__main__ import main
from tests.benchmarks.catalogue import BENCHMARKS, TASKS
from tests.benchmarks.harness import (
    EXTRA,
    MEMORY,
    TIME,
    WALL,
    Measured,
    Row,
    Side,
    compare,
    exponent,
    growth,
    launch,
)
from tests.benchmarks.inputs import Workshop
from tests.benchmarks.report import machine, results_table, write_json
from tests.support.paths import ROOT


def launch_here(
    task: str, *, processes: int = 1, threads: int | None = None, **arguments: Any
) -> Measured:
    """The harness's ``launch`` without a process for each task, whose imports take seconds."""
    if processes > 1:
        return launch(task, processes=processes, threads=threads, **arguments)
    started = time.perf_counter()
    measured = TASKS[task](**arguments)
    return {
        **measured,
        WALL: time.perf_counter() - started,
        MEMORY: float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss),
    }


APART = ("processes", "authors-script")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("benchmarks"), launch_here, quick=True, rounds=1)


@pytest.mark.parametrize(
    "name",
    [
        # What runs as a user would start it cannot be stood in for.
        pytest.param(name, marks=pytest.mark.long if name in APART else ())
        for name in BENCHMARKS
    ],
)
def test_every_benchmark_runs(name: str, shop: Workshop, tmp_path: Path) -> None:
    rows = BENCHMARKS[name](shop)
    assert rows
    for row in rows:
        assert math.isfinite(row.result)
        for label, values in row.samples.items():
            assert len(values) == 1, label
            # A peak that an earlier test set already does not grow.
            assert all(value > 0 or row.quantity == EXTRA for value in values), label
    write_json(tmp_path / "out.json", rows, {})
    document = json.loads((tmp_path / "out.json").read_text())
    assert [row["benchmark"] for row in document["rows"]] == [row.benchmark for row in rows]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("start-up", "the import"),
        pytest.param("kernel", "arm_step", marks=pytest.mark.long),
    ],
)
def test_the_command_measures_in_fresh_processes_and_keeps_what_exists(
    name: str, label: str, tmp_path: Path
) -> None:
    out = tmp_path / "results.json"
    arguments = [name, "--quick", "--out", str(out)]
    first = CliRunner().invoke(main, arguments)
    assert first.exit_code == 0, first.output
    assert label in first.output
    before = out.read_text()
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2
    assert "--force" in again.output
    assert out.read_text() == before


def test_what_starts_the_tasks_is_small() -> None:
    """A child's peak memory starts at its parent's."""
    program = "import sys; import tests.benchmarks.__main__; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout == "False\n"


def test_a_task_that_fails_shows_its_output() -> None:
    with pytest.raises(RuntimeError, match="No such file"):
        launch("build_tokens", out="/nonexistent/tokens", sequences=1, length=1, words=2)


def test_sides_take_turns_and_medians_are_compared() -> None:
    order = []
    times = {"a": iter([3.0, 8.0, 100.0]), "b": iter([1.0, 2.0, 4.0])}

    def run(side: str) -> Measured:
        order.append(side)
        return {TIME: next(times[side])}

    (row,) = compare(
        "name", Side("a", lambda: run("a")), Side("b", lambda: run("b")), {TIME: 3.0}, rounds=3
    )
    assert order == ["a", "b"] * 3
    assert (row.result, row.lowest, row.highest) == (4.0, 3.0, 25.0)
    assert row.samples == {"a": [3.0, 8.0, 100.0], "b": [1.0, 2.0, 4.0]}


def test_the_exponent_of_a_power_law_is_its_power() -> None:
    sizes = [1.0, 3.0, 20.0]
    assert exponent(sizes, [5 * size**1.25 for size in sizes]) == pytest.approx(1.25)
    rounds = iter([1.0, 2.0, 1.5])

    def one_round() -> list[tuple[str, float, float]]:
        power = next(rounds)
        return [(str(size), size, size**power) for size in sizes]

    row = growth("name", TIME, one_round, 1.05, rounds=3)
    assert row.result == pytest.approx(1.5)
    assert (row.lowest, row.highest) == (pytest.approx(1.0), pytest.approx(2.0))


def test_results_name_the_machine_but_neither_host_nor_paths(tmp_path: Path) -> None:
    described = machine()
    assert {"processor", "cores", "memory_gib", "python", "torch", "mergekit"} <= set(described)
    rows = [Row("name", MEMORY, "MB", {"a": [3e6], "b": [2e6]}, "ratio", 1.5, 1.5, 1.5, 1.0)]
    write_json(tmp_path / "out.json", rows, {})
    text = (tmp_path / "out.json").read_text()
    assert str(tmp_path) not in text
    assert platform.node() not in text
    assert results_table(rows, described).row_count == 1


def test_the_page_of_results_is_generated() -> None:
    assert results.PAGE.read_text(encoding="utf-8") == results.page()
