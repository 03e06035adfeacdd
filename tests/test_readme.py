"""What the texts tell people to run is what is tested, and what they name exists."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.scripts.multimerge import main as mergekit_multi
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_arm.cli.main import COMMANDS, module_of
from mergekit_arm.tuning.candidates import default_points, document_of, domains
from mergekit_arm.tuning.config import load_tuning
from tests.benchmarks.__main__ import main as benchmarks
from tests.support.paths import PACKAGE, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = sorted(
    path
    for folder in (ROOT, ROOT / "mergekit_arm", ROOT / "tests", ROOT / "example_configs")
    for path in (folder.glob("*.md") if folder == ROOT else folder.rglob("*.md"))
)
OTHERS = {"--help", "--verbose", "--target", "--index-url", "--nproc-per-node"}
OTHERS |= {"--imatrix", "--process-output"}
"""Flags of pip, torchrun and llama.cpp, and those of every command."""
CONFIGS = sorted((ROOT / "example_configs").glob("*.yml"))


def test_ci_runs_readme_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    (command,) = (line for line in lines if line.endswith("pytest"))
    assert command in README.splitlines()


def test_the_front_page_is_short() -> None:
    assert len(README.encode()) < 10_240


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_is_named_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = {ROOT / name for name in re.findall(r"`(tests/[\w/]+\.\w+)`", text)}
    links = {target for target in re.findall(r"\]\(([^)#]+)\)", text) if "//" not in target}
    named |= {path.parent / target for target in links}
    assert not sorted(str(one) for one in named if not one.exists())


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_that_is_named_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_promises_name_their_tests() -> None:
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    rows = text.partition("| promise | shown by |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(rows) >= 10
    assert not [row for row in rows if not re.search(r"`tests/[\w/]+\.py(::\w+)?`", row)]


def test_the_rooms_that_are_named_exist() -> None:
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    table = text.partition("| --- | --- |")[2].partition("\n\n")[0]
    named = re.findall(r"`([\w/]+(?:\.py|/))`", table)
    assert len(named) > 15
    assert not [name for name in named if not (PACKAGE / name).exists()]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_that_is_named_exists(path: Path) -> None:
    commands = [import_module(module_of(name)).command for name in COMMANDS]
    known = {
        flag
        for command in (*commands, benchmarks, mergekit_yaml, mergekit_multi)
        for parameter in command.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    } | OTHERS
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text(encoding="utf-8")))
    assert named <= known


def test_every_command_is_described() -> None:
    for name in COMMANDS:
        assert f"mergekit-arm {name}" in README


def check_merge(config: dict[str, object]) -> None:
    method = merge_methods.get(str(config["merge_method"]))
    parsed = MergeConfiguration.model_validate(config)
    known = {parameter.name for parameter in method.spec.parameters}
    assert set(parsed.parameters or {}) <= known
    for model in parsed.models or []:
        assert set(model.parameters or {}) <= known


def test_merge_configurations_in_the_readme_are_mergekits() -> None:
    found = [re.findall(r"```yaml\n(.*?)```", path.read_text(), re.S) for path in TEXTS]
    blocks = [yaml.safe_load(text) for texts in found for text in texts]
    # The tutorial's own method is merged by its test.
    merges = [one for one in blocks if "models" in one and one["merge_method"] != "peak_guard"]
    assert merges
    for block in merges:
        check_merge(block)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_configurations_are_valid(path: Path) -> None:
    *stages, config = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    for stage in stages:
        check_merge({key: value for key, value in stage.items() if key != "name"})
    if "checkpoints" in config:
        from mergekit_arm.streaming.config import load_config

        assert load_config(str(path)).merge_method == config["merge_method"]
    elif "tuning" in config:
        read = load_tuning(path)
        points = default_points(read.space, domains(read.space))
        assert [method for method, _ in points] == list(read.space.methods)
        for point in points:
            check_merge(document_of(read.space, point))
    else:
        check_merge(config)
