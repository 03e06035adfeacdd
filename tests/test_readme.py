"""What README.md tells people to run is what is tested, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_arm.cli import main as cli_module
from mergekit_arm.cli.calibrate import command as calibrate_command
from mergekit_arm.cli.stream import command as stream_command
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "example_configs").glob("*.yml"))


def test_ci_runs_readme_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    (command,) = (line for line in lines if line.endswith("pytest"))
    assert command in README.splitlines()


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.\w+)`", README))
    named |= {target for target in re.findall(r"\]\(([^)#]+)\)", README) if "//" not in target}
    missing = sorted(path for path in named if not (ROOT / path).exists())
    assert not missing
    assert len(named) > 5


def test_every_flag_that_is_named_exists() -> None:
    known = {
        flag
        for command in (calibrate_command, stream_command, mergekit_yaml)
        for parameter in command.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help", "--verbose", "--target", "--index-url", "--nproc-per-node"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named <= known


def test_every_command_is_described() -> None:
    for name in cli_module.COMMANDS:
        assert f"mergekit-arm {name}" in README


def check_merge(config: dict[str, object]) -> None:
    method = merge_methods.get(str(config["merge_method"]))
    parsed = MergeConfiguration.model_validate(config)
    known = {parameter.name for parameter in method.spec.parameters}
    assert set(parsed.parameters or {}) <= known
    for model in parsed.models or []:
        assert set(model.parameters or {}) <= known


def test_merge_configurations_in_the_readme_are_mergekits() -> None:
    blocks = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", README, re.S)]
    merges = [block for block in blocks if "models" in block]
    assert len(merges) >= 2
    for block in merges:
        check_merge(block)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_configurations_are_valid(path: Path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "checkpoints" in config:
        from mergekit_arm.streaming.config import load_config

        assert load_config(str(path)).merge_method == config["merge_method"]
    else:
        check_merge(config)
