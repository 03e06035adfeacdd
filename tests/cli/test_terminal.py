"""Completion, colours, Ctrl-C and ``--json``, by real processes."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mergekit_arm.cli.main import COMMANDS, cli, main
from tests.support import forks

COMMAND = [sys.executable, "-m", "mergekit_arm"]


def complete(*words: str) -> list[str]:
    """Ask as bash does, with the cursor behind the last of ``words``."""
    asked = {"COMP_WORDS": " ".join(["mergekit-arm", *words]), "COMP_CWORD": str(len(words))}
    done = subprocess.run(
        COMMAND,
        env={**os.environ, **asked, "_MERGEKIT_ARM_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_commands_and_options_are_completed() -> None:
    assert complete("c") == ["check", "calibrate", "combine"]
    assert "--dry-run" in complete("tune", "--d")
    assert "--low-cpu-memory" in complete("stream", "--low")
    assert complete("calibrate", "--recipe", "a") == ["aim"]
    complete("calibrte", "--s")  # no error in the middle of a line


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_takes_the_script() -> None:
    environment = {**os.environ, "_MERGEKIT_ARM_COMPLETE": "bash_source"}
    script = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, check=True)
    text = f"{script.stdout}\ncomplete -p mergekit-arm"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    assert "mergekit-arm" in done.stdout, done.stderr


YELLOW = "\x1b[33m"
TABLE = """
from rich.table import Table
from mergekit_arm.cli.output import print_tables
table = Table()
table.add_row("starved", style="yellow")
print_tables([table])
"""


def on_a_terminal(program: str, **environment: str) -> str:
    """Run a program with a terminal as its output, and return what it wrote there."""
    mine, its = pty.openpty()
    known = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=its,
        env={**known, "TERM": "xterm-256color", **environment},
    ):
        os.close(its)
        written = b""
        try:
            while piece := os.read(mine, 4096):
                written += piece
        except OSError:  # how Linux says that the other side is closed
            pass
    os.close(mine)
    return written.decode()


def test_colours_are_for_terminals_that_want_them() -> None:
    assert YELLOW in on_a_terminal(TABLE)
    plain = on_a_terminal(TABLE, NO_COLOR="1")
    assert "starved" in plain
    assert YELLOW not in plain
    done = subprocess.run([sys.executable, "-c", TABLE], capture_output=True, text=True, check=True)
    assert "starved" in done.stdout
    assert "\x1b" not in done.stdout


def interrupted(*arguments: str) -> str:
    """Run a command whose library is interrupted by Ctrl-C; return what it says."""
    program = (
        "import importlib, os, signal, sys\n"
        "from mergekit_arm.cli.main import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background shells ignore it
        f"importlib.import_module('mergekit_arm.cli.' + {arguments[0]!r}).command.callback = "
        f"lambda **_: os.kill(os.getpid(), {signal.SIGINT.value})\n"
        f"sys.argv = ['mergekit-arm', *{arguments!r}]\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr.strip()


def test_ctrl_c_says_how_to_go_on() -> None:
    goes_on = "Stopped. The same command goes on where it was."
    assert interrupted("tune", "config.yml", "out") == goes_on
    assert interrupted("stream", "config.yml", "out") == goes_on
    assert "begins anew" in interrupted("combine", "a", "b", "out")
    assert "with --force" in interrupted("demo")


def test_json_is_one_document_and_alone(family: Path, token_file: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> dict[str, object]:
        done = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
        assert done.exit_code == 0, done.output
        found: dict[str, object] = json.loads(done.stdout)
        return found

    measure = ("--dataset", token_file, "--keep-sketch")
    found = run("calibrate", family / "base", tmp_path / "none", *measure, "--dry-run")
    (estimate,) = found["estimates"]  # type: ignore[misc]
    assert (estimate["tokens"], (tmp_path / "none").exists()) == (12 * 32, False)
    for part, rows in (("1/2", 7), ("2/2", 5)):
        out = tmp_path / part[0]
        found = run("calibrate", family / "base", out, *measure, "--part", part, "--quiet")
        (written,) = found["written"]  # type: ignore[misc]
        assert (written["out"], written["sequences"]) == (str(out), rows)
    found = run("combine", tmp_path / "1", tmp_path / "2", tmp_path / "both")
    assert (found["sequences"], found["tokens"]) == (12, 12 * 32)
    found = run("export-imatrix", tmp_path / "both", tmp_path / "im.gguf")
    assert found["weights"] == 15
    found = run("import-imatrix", tmp_path / "im.gguf", family / "base", tmp_path / "back")
    assert found["mean_abs"] is True
    found = run("push", tmp_path / "both", "someone/tiny", "--dry-run")
    assert "activation_stats.json" in found["files"]  # type: ignore[operator]
    found = run("report", tmp_path / "both", "-o", tmp_path / "both.html")
    assert found["kind"] == "statistics"
    (tmp_path / "stream.yml").write_text(
        json.dumps(
            {
                "merge_method": "task_arithmetic",
                "base_model": str(family / "base"),
                "checkpoints": [str(family / "a")],
                "learning_rate": 0.5,
            }
        )
    )
    planned = dry("stream", tmp_path / "stream.yml")
    assert planned["steps"] == [
        {
            "step": 1,
            "checkpoint": str(family / "a"),
            "learning_rate": 0.5,
            "calibrates": False,
        }
    ]
    assert planned["needs"]["disk"] > 0
    assert planned["problems"] == []
    found = run("stream", tmp_path / "stream.yml", tmp_path / "streamed", "--quiet")
    (step,) = found["steps"]  # type: ignore[misc]
    assert (found["chosen"], step["learning_rate"]) == (1, 0.5)
    (tmp_path / "tune.yml").write_text(
        json.dumps(
            {
                "merge_method": "task_arithmetic",
                "base_model": str(family / "base"),
                "models": [
                    {"model": str(family / "a"), "parameters": {"weight": {"tune": [0, 1]}}}
                ],
                "tuning": {"evaluation": {"held": {"dataset": str(token_file)}}, "baseline": False},
            }
        )
    )
    planned = dry("tune", tmp_path / "tune.yml")
    assert planned["unknowns"] == [
        {"method": "task_arithmetic", "unknown": "weight of a", "domain": "[0, 1]", "first": 0.5}
    ]
    assert (planned["trials"], planned["forecast"]["models"]) == (40, 42)
    found = run("tune", tmp_path / "tune.yml", tmp_path / "out", "--trials", 1, "--no-model")
    assert found["best"]["number"] == 0  # type: ignore[index]
    assert found["model"] is None


def dry(name: str, file: Path) -> dict[str, Any]:
    """Return what a dry run prints as JSON; it leaves nothing."""
    out = file.parent / "dry"
    done = CliRunner().invoke(cli, [name, str(file), str(out), "--dry-run", "--json"])
    assert (done.exit_code, out.exists()) == (0, False), done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_quiet_and_verbose(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mergekit-arm", name, "--verbose", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert "--quiet" in text


QUIET = """
import sys, time
from mergekit_arm.cli.output import working
sys.stderr = sys.stdout
with working("Reading", quiet=%r):
    time.sleep(0.3)
"""


def test_quiet_commands_draw_no_moving_sign() -> None:
    assert "Reading" in on_a_terminal(QUIET % False)
    assert on_a_terminal(QUIET % True) == ""


def test_verbose_may_stand_behind_a_command() -> None:
    done = forks.run("mergekit-arm", "calibrate", "a", "b", "--part", "9/2", "--verbose")
    assert "Traceback" in done.stderr
