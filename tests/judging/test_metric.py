"""The user's command: which of its lines counts, how it ends, and that it never outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mergekit_arm.errors import Failure
from mergekit_arm.judging.metric import run_metric
from mergekit_arm.judging.placeholder import with_parameters

AWKWARD = """a model's "name" $HOME `date` \\ #1; x"""


@pytest.mark.parametrize(
    "command",
    [
        "printf %s {model} > {scratch}/found",
        'printf %s "{model}" > "{scratch}/found"',
        "cat > {scratch}/it.sh; printf %s '{model}' > '{scratch}/found'",
        'printf %s "$(printf %s {model})" > {scratch}/found',
        'printf %s "$(printf %s "{model}")" > {scratch}/found',
        'x="{model}"; printf %s "$x" > {scratch}/found # it\'s {model}',
        "printf %s \\'{model} | cut -c2- | tr -d '\\n' > {scratch}/found",
        'printf %s pre={model},post | sed "s/^pre=//; s/,post$//" > {scratch}/found # do not',
    ],
)
def test_a_path_arrives_whole_wherever_it_stands(tmp_path: Path, command: str) -> None:
    scratch = tmp_path / "a scratch"
    scratch.mkdir()
    assert run_metric(f"{command}\necho 1", AWKWARD, scratch) == 1
    assert (scratch / "found").read_text() == AWKWARD


def test_other_braces_and_parameters_stay() -> None:
    command = "awk '{print $1}' ${HOME} {other} {}"
    assert with_parameters(command, ("model",)) == command


def test_the_last_line_counts(tmp_path: Path) -> None:
    assert run_metric("echo 3; echo -1.5e-3; echo '  '", "x", tmp_path) == -1.5e-3
    assert run_metric("echo 7; echo 9 >&2", "x", tmp_path) == 7
    assert run_metric("echo loss=2; echo .5", "x", tmp_path) == 0.5


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo 10; echo nan", "last line is 'nan', which is no finite number"),
        ("echo 12; echo acc=0.7", "last line is 'acc=0.7'"),
        ("echo 1e999", "last line is '1e999'"),
        ("echo inf", "last line is 'inf'"),
        ("true", "printed nothing"),
        ("echo worse >&2; echo 3; exit 7", "ended with status 7: worse"),
        ("kill -TERM $$", "ended with status -15: it said nothing"),
        ("exec sleep 60", "longer than its timeout of 0.5 s"),
        ("sleep 60 & wait", "longer than its timeout of 0.5 s"),
    ],
)
def test_what_is_no_number_is_refused_with_its_line(
    tmp_path: Path, command: str, said: str
) -> None:
    begun = time.monotonic()
    with pytest.raises(Failure) as caught:
        run_metric(command, "x", tmp_path, timeout=0.5 if "timeout" in said else None)
    assert said in caught.value.message
    assert time.monotonic() - begun < 20
    assert "\n" not in caught.value.message


def test_output_is_shown_as_it_comes_and_kept(tmp_path: Path) -> None:
    """The command goes on only once its first line was seen here."""
    seen: list[str] = []

    def say(line: str) -> None:
        seen.append(line)
        (tmp_path / "go").touch()

    command = "echo one >&2; while ! test -e {model}/go; do sleep 0.02; done; echo 2"
    log = tmp_path / "log"
    assert run_metric(command, str(tmp_path), tmp_path, timeout=20, say=say, log=log) == 2
    assert seen == ["one", "2"]
    assert log.read_text() == "one\n2\n"


def gone(pid: int) -> bool:
    """Say whether a process ends within seconds; one that nobody waits for has ended."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_what_a_command_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    command = "sleep 300 & echo $! > {scratch}/pid; echo 4"
    assert run_metric(command, "x", tmp_path) == 4
    assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_command_dies_with_us(tmp_path: Path, by: signal.Signals) -> None:
    program = (
        "import signal, sys; from pathlib import Path;"
        "from mergekit_arm.judging.metric import run_metric;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # background shells ignore it
        "run_metric('sleep 300 & echo $! > {scratch}/a; echo $$ > {scratch}/b; wait', 'x', "
        "Path(sys.argv[1]))"
    )
    ours = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    files = [tmp_path / "a", tmp_path / "b"]
    for _ in range(600):
        if all(file.exists() and file.read_text().strip() for file in files):
            break
        time.sleep(0.05)
    pids = [int(file.read_text()) for file in files]
    time.sleep(0.2)  # the watcher is told of the group right after the command has begun
    os.kill(ours.pid, by)
    ours.wait(20)
    assert all(gone(pid) for pid in pids)
