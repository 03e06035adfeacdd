"""What a long run shows: bars on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from mergekit_arm.cli.progress import EVERY, Display
from tests.support import forks


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_come_every_half_minute_where_there_is_no_terminal(terminal: bool) -> None:
    clock, text = Clock(), io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100)
    with Display(console, clock) as display:
        display.stage("Loading the model", 0, 0)
        assert "Loading the model …" in text.getvalue()  # at once
        for second in range(121):
            clock.now = float(second)
            display.tokens(100 * (second + 1), 24_200)
        for second in range(121, 182):
            clock.now = float(second)
            display.stage("Finishing inputs", second - 121, 100)
    shown = text.getvalue()
    if terminal:
        assert "Calibrating" in shown
        assert "12,100/24,200 tokens, 100/s" in shown
        assert "Finishing inputs" in shown
        return
    lines = shown.splitlines()
    assert len(lines) == 1 + 120 // EVERY + 60 // EVERY
    assert lines[4] == "Calibrating: 12,100 of 24,200 tokens, 100 tokens/s, 2 min left"
    assert lines[-1] == "Finishing inputs: 59 of 100, 1.00/s, 41 s left"


def test_what_an_earlier_run_has_done_is_not_counted_as_speed() -> None:
    clock, text = Clock(), io.StringIO()
    with Display(Console(file=text, width=100), clock) as display:
        display.tokens(1_000_000, 1_003_000)
        clock.now = 100.0
        display.tokens(1_001_000, 1_003_000)
    assert text.getvalue().split(": ")[1] == (
        "1,001,000 of 1,003,000 tokens, 10 tokens/s, 3 min left\n"
    )


def test_redirected_output_says_from_the_start_what_is_under_way(
    family: Path, token_file: Path, tmp_path: Path
) -> None:
    done = forks.run(
        "mergekit-arm", "calibrate", family / "base", tmp_path / "s", "--dataset", token_file
    )
    assert done.returncode == 0, done.stderr
    stages = [line for line in done.stderr.splitlines() if line.endswith(" …")]
    assert stages == [
        "Loading libraries …",
        "Finding the model …",
        "Reading the data …",
        "Loading the model …",
        "Writing the statistics …",
    ]
    assert "\r" not in done.stderr  # no bar of any library
