"""The command line: fast help, one-line errors, exit statuses, defaults in step."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.cli import main as cli_module
from mergekit_arm.cli.calibrate import command as calibrate_command
from mergekit_arm.cli.stream import command as stream_command
from tests.support import forks

COMMAND = [sys.executable, "-m", "mergekit_arm"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)


def test_help_loads_no_library_of_models() -> None:
    """What makes it instant, on any machine: the libraries that take seconds are not imported."""
    program = (
        "import sys; from mergekit_arm.cli.main import main; sys.argv = ['x', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(*{'torch', 'transformers', 'mergekit', 'datasets', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "Commands:" in done.stdout
    assert done.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize("name", cli_module.COMMANDS)
def test_help_of_a_subcommand_loads_no_torch(name: str) -> None:
    program = (
        "import sys; from mergekit_arm.cli.main import main; sys.argv = ['x', %r, '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "slow = {'torch', 'transformers', 'mergekit', 'datasets', 'rich'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = subprocess.run(
        [sys.executable, "-c", program % name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_every_command_is_listed_with_its_first_line() -> None:
    listing = run("--help").stdout
    for name in cli_module.COMMANDS:
        assert f"  {name} " in listing


def test_unknown_commands_and_options_name_the_nearest() -> None:
    done = run("calibrte")
    assert done.returncode == 2
    assert "did you mean 'calibrate'" in done.stderr
    done = run("calibrate", "a", "b", "--sampels", "3")
    assert done.returncode == 2
    assert "--samples" in done.stderr


def test_errors_are_one_line_unless_verbose(tmp_path: Path) -> None:
    wrong = ("calibrate", str(tmp_path), str(tmp_path / "out"), "--dataset", "./nowhere.jsonl")
    done = forks.run("mergekit-arm", *wrong)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("Error: ")]) == 1
    assert "Traceback" in forks.run("mergekit-arm", "--verbose", *wrong).stderr


def test_defaults_of_the_command_and_of_the_library_agree() -> None:
    options = {field.name: field for field in dataclasses.fields(CalibrationOptions)}
    parameters = {parameter.name: parameter for parameter in calibrate_command.params}
    assert set(parameters) == {*options, "config", "as_json"}
    for name, parameter in parameters.items():
        if name in ("model", "out", "config", "as_json"):
            continue
        default = parameter.get_default(click.Context(calibrate_command))
        if name == "statistics":
            default = (default,)
        if name == "dataset":  # several can be given
            (default,) = default
        assert default == options[name].default, name


def test_calibrate_prints_a_table(family: Path, token_file: Path, tmp_path: Path) -> None:
    done = forks.run(
        "mergekit-arm", "calibrate", family / "base", tmp_path / "stats", "--dataset", token_file
    )
    assert done.returncode == 0, done.stderr
    assert "12 sequences, not 256" in done.stderr.replace("\n", " ")
    assert "weights at" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr  # no colour and no bar
    assert (tmp_path / "stats" / "activation_stats.json").is_file()


def test_help_shows_every_option() -> None:
    for command in (calibrate_command, stream_command):
        text = CliRunner().invoke(command, ["--help"]).output
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.opts[0] in text
