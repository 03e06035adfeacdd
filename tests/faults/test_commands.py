"""Commands under faults: no room on the disk, signals, two at once, a clock that goes back.

Each ends in one clear line or goes on, and the same command comes to the same bytes once the fault
is over. The processes are forked from one that has imported everything.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_arm.cli.main import main
from tests.support import streams, tuning
from tests.support.calibrations import files
from tests.support.forks import server

pytestmark = pytest.mark.slow

CALIBRATE = ["calibrate", "base", "OUT", "--dataset", "tokens.jsonl", "--save-every", "0",
             "--batch-size", "2", "--quiet"]  # fmt: skip
STREAM = ["stream", "stream.yml", "OUT", "--quiet"]
TUNE = ["tune", "tune.yml", "OUT", "--quiet"]
COMMANDS = [CALIBRATE, STREAM, TUNE]


def no_fault() -> None:
    pass


def small_disk(limit: int) -> None:
    """Let no file grow beyond ``limit`` bytes: writing fails as where there is no room."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def clock_goes_back() -> None:
    """Let the time of day be an hour less at every look."""
    now = itertools.count(time.time(), -3600)
    time.time = lambda: next(now)


def signalled(number: int, seconds: float) -> None:
    """Send this process a signal before long."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells have it ignored
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def live(folder: str, arguments: list[str], fault: Callable[[], None], sender: Any) -> None:
    """Run a command in this process."""
    os.chdir(folder)
    fault()
    sys.argv = ["mergekit-arm", *arguments]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            main()
        except SystemExit as end:
            sender.send((end.code, said.getvalue()))


def run(
    folder: Path, arguments: list[str], out: str, *faults: Callable[[], None]
) -> list[tuple[int, str]]:
    """Run a command as often as there are faults, all at once; return status and output of each."""
    started = []
    for fault in faults or (no_fault,):
        receive, send = server().Pipe(duplex=False)
        given = [out if one == "OUT" else one for one in arguments]
        child = server().Process(target=live, args=(str(folder), given, fault, send))
        child.start()
        send.close()
        started.append((child, receive))
    results = []
    for child, receive in started:
        try:
            code, said = receive.recv()
        except EOFError:
            code, said = -1, "killed"
        child.join()
        results.append((int(code or 0), said))
    return results


def assert_one_line(said: str) -> str:
    """Return the line in which a command has said why it ended."""
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, said
    return lines[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk")
    streams.write_run(folder, (1, 2))
    tuning.write_family(folder)
    document = streams.config(folder, evaluation={"dataset": str(folder / "one.jsonl")})
    (folder / "stream.yml").write_text(yaml.safe_dump(document))
    sets = {"one": {"dataset": str(folder / "one.jsonl")}}
    settings = {"evaluation": sets, "trials": 3, "sampler": "grid", "pruning": False}
    (folder / "tune.yml").write_text(yaml.safe_dump(tuning.config(folder, settings)))
    return folder


def content(arguments: list[str], out: Path) -> Any:
    """What must not depend on interruptions."""
    if arguments is CALIBRATE:
        return files(out)
    if arguments is STREAM:
        for path in out.rglob("config.yml"):
            path.write_text(path.read_text().replace(str(out), "OUT"))
        return streams.digest(out)
    kept = ("study", "outcome", "values", "scores")
    trials = [{key: one[key] for key in kept} for one in tuning.lines(out)]
    return sorted(map(str, trials)), (out / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, Any]:
    """What each command makes where nothing goes wrong."""
    found = {}
    for arguments in COMMANDS:
        out = f"{arguments[0]}-whole"
        assert run(place, arguments, out)[0][0] == 0
        found[arguments[0]] = content(arguments, place / out)
    return found


def ends_the_same(place: Path, arguments: list[str], out: str, whole: dict[str, Any]) -> None:
    ((code, said),) = run(place, arguments, out)
    done = arguments is CALIBRATE and code == 2 and "exists; add --force" in said
    assert code == 0 or done, said
    assert content(arguments, place / out) == whole[arguments[0]]


each_command = pytest.mark.parametrize("arguments", COMMANDS, ids=[one[0] for one in COMMANDS])


@each_command
def test_no_room(arguments: list[str], place: Path, whole: dict[str, Any]) -> None:
    out = f"{arguments[0]}-full"
    for limit in (5_000, 20_000, 60_000):
        ((code, said),) = run(place, arguments, out, partial(small_disk, limit))
        if code == 0:  # there was room for what was left
            break
        assert code == 1, said
        line = assert_one_line(said)
        assert "File too large" in line or "disk" in line, line
    else:
        assert limit == 60_000
    ends_the_same(place, arguments, out, whole)


@pytest.fixture
def small_disk_at(place: Path) -> Iterator[Path]:
    """A file system of eight megabytes, mounted below the place where the commands run."""
    folder = place / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        folder.rmdir()
        pytest.skip(f"no mounting here ({mounted.stderr.strip()}): test_no_room limits files")
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


@pytest.mark.long
@each_command
def test_a_full_disk(
    arguments: list[str], place: Path, whole: dict[str, Any], small_disk_at: Path
) -> None:
    """Somebody else's file leaves nothing, or enough to begin; then it goes, and there is room."""
    out, met, ballast = f"disk/{arguments[0]}", 0, small_disk_at / "ballast"
    for left in (0, 8_192, 40_960, 122_880, 204_800, 409_600):
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk_at).free - left))
        ((code, said),) = run(place, arguments, out)
        ballast.unlink()
        if code == 0:
            break
        met += 1
        line = assert_one_line(said)
        print(f"{arguments[0]}, {left} bytes left: {line}")  # noqa: T201  what pytest -s shows
        assert code in (1, 2), line
        assert re.search("No space left|of disk|no room on the disk", line), line
        assert "another OUT" in line or "elsewhere" in line or "same command" in line, line
    assert met > 1
    ends_the_same(place, arguments, out, whole)


@each_command
def test_two_at_once(arguments: list[str], place: Path, whole: dict[str, Any]) -> None:
    """They share the work, or one of them says that the other is at it."""
    out = f"{arguments[0]}-twice"
    results = run(place, arguments, out, no_fault, no_fault)
    assert 0 in [code for code, _ in results], results
    for code, said in results:
        if code:
            assert_one_line(said)
    ends_the_same(place, arguments, out, whole)


@pytest.mark.long
@each_command
def test_signals(arguments: list[str], place: Path, whole: dict[str, Any]) -> None:
    out = f"{arguments[0]}-signalled"
    for number, seconds in ((signal.SIGTERM, 0.3), (signal.SIGINT, 0.7), (signal.SIGTERM, 1.2)):
        ((code, said),) = run(place, arguments, out, partial(signalled, number, seconds))
        assert "Traceback" not in said
        if code not in (0, -1):
            assert "SIG" in said or "Stopped" in said or "exists" in said, said
    ends_the_same(place, arguments, out, whole)


@pytest.mark.long
@each_command
def test_a_clock_that_goes_back(arguments: list[str], place: Path, whole: dict[str, Any]) -> None:
    out = f"{arguments[0]}-back"
    ((code, said),) = run(place, arguments, out, clock_goes_back)
    assert code == 0, said
    assert content(arguments, place / out) == whole[arguments[0]]
