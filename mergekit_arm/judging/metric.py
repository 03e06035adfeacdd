"""A number from the user's own command."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mergekit_arm.errors import Failure
from mergekit_arm.judging.placeholder import with_parameters

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

TICK = 1.0
"""Seconds between two reports on a command that runs."""

_READING = 5.0
"""Seconds for which the rest of the output is waited for, should some daemon hold the pipe."""

_WATCHER = 'read group && { read over || kill -s KILL -- "-$group" 2>&-; }'
"""Ends the command's processes once the pipe that it reads closes without a second line."""


def run_metric(
    command: str,
    model: str,
    scratch: Path,
    *,
    timeout: float | None = None,
    say: Callable[[str], None] | None = None,
    log: Path | None = None,
    on_second: Callable[[float], None] = lambda spent: None,
) -> float:
    """Run the user's command for ``model``, and return the number on its last line.

    ``{model}`` becomes the model's directory and ``{scratch}`` an empty directory for files,
    within quotes too. The command runs in a session of its own and never outlives this process,
    nor do processes that it leaves behind outlive the command.

    Args:
        command: for the shell.
        model: a directory, of any name.
        scratch: a directory.
        timeout: seconds; none by default.
        say: receives every line that it prints, as it comes.
        log: a file for the same lines, replaced.
        on_second: called at its start and every second with the seconds that it has run.

    Raises:
        Failure: it fails, takes too long, or its last line that is not empty is no finite number.
    """
    filled = with_parameters(command, ("model", "scratch"))
    output = _Output(say, on_second)
    with log.open("w", encoding="utf-8") if log else open(os.devnull, "w") as file:
        output.file = file
        status = _run(["sh", "-c", filled, "sh", model, str(scratch)], timeout, output)
    it_was = f"(it was: {command}, model {model})"
    if status is None:
        raise Failure(f"metric_command took longer than its timeout of {timeout:g} s {it_was}")
    if status != 0:
        said = output.errors or output.lines
        raise Failure(
            f"metric_command ended with status {status}: "
            f"{said[-1][:200] if said else 'it said nothing'} {it_was}"
        )
    if not output.lines:
        raise Failure(f"metric_command printed nothing; end it with a number {it_was}")
    last = output.lines[-1]
    number = float(last) if _NUMBER.fullmatch(last) else math.nan
    if not math.isfinite(number):
        raise Failure(
            f"metric_command's last line is {last[:200]!r}, which is no finite number; "
            f"end it with one {it_was}"
        )
    return number


class _Output:
    """Takes the lines of a command's two streams, from a thread each."""

    def __init__(
        self, say: Callable[[str], None] | None, on_second: Callable[[float], None]
    ) -> None:
        self.on_second = on_second
        self.lines: list[str] = []
        """Of the standard output, stripped; empty ones left out. So is what is below."""
        self.errors: list[str] = []
        self.file: IO[str] | None = None
        self._say = say
        self._lock = threading.Lock()

    def take(self, stream: IO[str], kept: list[str]) -> None:
        for line in stream:
            with self._lock:
                if self._say is not None:
                    self._say(line.rstrip("\n"))
                if self.file is not None:
                    self.file.write(line)
                    self.file.flush()
                if line.strip():
                    kept.append(line.strip())
                    del kept[:-1000]  # of a very talkative command the end suffices


def _run(words: list[str], timeout: float | None, output: _Output) -> int | None:
    """Run a command and return its exit status, or None where the time was over first."""
    with (
        subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
        _watched(process.pid),
    ):
        readers = [
            threading.Thread(target=output.take, args=(stream, kept), daemon=True)
            for stream, kept in ((process.stdout, output.lines), (process.stderr, output.errors))
        ]
        for reader in readers:
            reader.start()
        begun, spent, end = time.monotonic(), 0.0, math.inf if timeout is None else timeout
        try:
            while spent < end:
                output.on_second(spent)
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(min(TICK, end - spent))
                spent = time.monotonic() - begun
            return None
        finally:
            # What it left behind would hold the pipes open, and the readers with them.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            for reader in readers:
                reader.join(_READING)


@contextmanager
def _watched(group: int) -> Iterator[None]:
    """End a group of processes should this process die, by whatever signal.

    The other end of a pipe is closed by the system then; a watcher waits for that. It is in a
    session of its own, which Ctrl-C does not reach.
    """
    with subprocess.Popen(
        ["sh", "-c", _WATCHER], stdin=subprocess.PIPE, text=True, start_new_session=True
    ) as watcher:
        assert watcher.stdin is not None
        watcher.stdin.write(f"{group}\n")
        watcher.stdin.flush()
        try:
            yield
        finally:
            with suppress(BrokenPipeError):
                watcher.stdin.write("over\n")
                watcher.stdin.close()
