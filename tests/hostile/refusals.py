"""The promise that every table here is held to, and what runs a command under it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
from click.testing import CliRunner


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    output: str
    exception: BaseException | None
    made: set[Path]
    """Files and directories that were not there before."""


def run(folder: Path, command: click.Command, *arguments: str) -> Result:
    """Run ``command`` in this process, and look at what it has made in ``folder``."""
    before = set(folder.rglob("*"))
    done = CliRunner().invoke(command, arguments)
    made = {
        path
        for path in set(folder.rglob("*")) - before
        # mergekit makes its output directory before there is anything to put into it.
        if not (path == folder / "out" and path.is_dir() and not any(path.iterdir()))
    }
    return Result(done.exit_code, done.output, done.exception, made)


def assert_refused(result: Result, said: tuple[str, ...]) -> None:
    """Hold a result to the promise: status 2, one line that has ``said`` in it, nothing made."""
    # What is not finite shows in the middle of the work: that may be the dtype's fault.
    assert result.code == (1 if "NaN or infinity" in said else 2), result.output + repr(
        result.exception
    )
    assert "Traceback" not in result.output
    lines = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    assert result.output.rstrip().endswith(lines[0]), "the message goes on after its line"
    for part in said:
        assert part in lines[0], lines[0]
    assert not {path.name for path in result.made}, result.made
