"""Our methods beside mergekit's, users' and other plugins', whatever these are called."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit import merge_methods
from mergekit.merge_methods import MergeMethod, TensorGroup, merge_state_dicts
from mergekit.scripts.run_yaml import main as mergekit_yaml
from torch import Tensor

from mergekit_arm.errors import InputError
from mergekit_arm.methods import register_all
from mergekit_arm.methods.arm import ArmMerge
from tests.support.merges import weights

WRAPPED = [
    name.spec.name
    for name in merge_methods.registered_methods()
    if type(name).__module__.startswith("mergekit_arm.")
]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """mergekit without us; returns a function that registers us and returns all names."""
    registry = merge_methods.registry
    theirs = {
        method.spec.name: method
        for method in merge_methods.registered_methods()
        if not type(method).__module__.startswith(("mergekit_arm.", "tests."))
    }

    def get(name: str) -> MergeMethod:
        return theirs[name]

    monkeypatch.setattr(registry, "_METHODS", theirs)
    monkeypatch.setattr(registry, "get", get)
    monkeypatch.setattr(merge_methods, "get", get)

    def names() -> set[str]:
        register_all()
        return {method.spec.name for method in merge_methods.registered_methods()}

    return names


def foreign(name: str, **parameters: Any) -> MergeMethod:
    """A user's method, with parameters of these names and defaults."""

    def first(group: TensorGroup, **values: Any) -> Tensor:
        return group.entries[0].tensor

    arguments = ", ".join(["group", *(f"{one}={value!r}" for one, value in parameters.items())])
    scope = {"first": first}
    exec(f"def kernel({arguments}): return first(group)", scope)
    kernel: Any = scope["kernel"]
    kernel.__annotations__ = {
        "group": TensorGroup,
        **{one: type(value) for one, value in parameters.items()},
        "return": Tensor,
    }
    return merge_methods.merge_method(kernel, name=name)  # type: ignore[no-any-return]


def test_registered_again_nothing_changes(fresh: Callable[[], set[str]]) -> None:
    assert fresh() == fresh()


@pytest.mark.parametrize("parameter", ["omega", "importance", "activation_stats"])
def test_a_method_with_a_parameter_of_aim_s(
    parameter: str, fresh: Callable[[], set[str]], caplog: pytest.LogCaptureFixture
) -> None:
    merge_methods.register(foreign("greek", **{parameter: "x"}))
    merge_methods.register(foreign("plain"))
    names = fresh()
    assert {"arm", "aim", "aim_ties", "aim_plain", "aim_arm"} <= names
    assert "aim_greek" not in names
    with pytest.raises(InputError, match=f"cannot wrap greek, which has a parameter {parameter}"):
        merge_methods.get("aim_greek")
    assert not caplog.records


def test_registered_after_us_too(fresh: Callable[[], set[str]]) -> None:
    fresh()
    merge_methods.register(foreign("late", omega=1.0))
    merge_methods.register(foreign("later"))
    with pytest.raises(InputError, match="AIM cannot wrap late"):
        merge_methods.get("aim_late")
    assert merge_methods.get("aim_later").spec.name == "aim_later"


@pytest.mark.parametrize("name", ["aim", "arm", "aim_ties"])
def test_a_foreign_method_of_our_name(
    name: str,
    fresh: Callable[[], set[str]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = foreign(name)
    merge_methods.register(theirs)
    with caplog.at_level(logging.WARNING):
        names = fresh()
    (record,) = caplog.records
    assert f"merge method {name} is not mergekit-arm's" in record.getMessage()
    assert f"set MERGEKIT_ARM_PREFIX=ours_ to reach it as ours_{name}" in record.getMessage()
    assert merge_methods.get(name) is theirs
    assert {"aim", "arm", "aim_ties", "aim_linear", "aim_arm"} <= names


def test_with_a_prefix_ours_are_reached_and_theirs_stay(
    fresh: Callable[[], set[str]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = {name: foreign(name) for name in ("aim", "arm")}
    for method in theirs.values():
        merge_methods.register(method)
    monkeypatch.setenv("MERGEKIT_ARM_PREFIX", "ours_")
    names = fresh()
    assert not caplog.records
    assert {"ours_aim", "ours_arm", "ours_aim_ties", "ours_aim_arm", "ours_aim_ours_arm"} <= names
    assert not {"aim_ties", "aim_linear"} & names
    for name, method in theirs.items():
        assert merge_methods.get(name) is method
    assert isinstance(merge_methods.get("ours_arm"), ArmMerge)
    merge_methods.register(foreign("late"))
    assert merge_methods.get("ours_aim_late").spec.name == "ours_aim_late"


def test_a_prefixed_method_merges(
    fresh: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch, family: Path
) -> None:
    monkeypatch.setenv("MERGEKIT_ARM_PREFIX", "ours_")
    fresh()
    states = {name: weights(family / name) for name in ("base", "a")}
    parameters = {"activation_stats": str(family / "stats"), "rotation": 0.0, "learning_rate": 1.0}
    merged = merge_state_dicts(states, "ours_arm", base="base", parameters=parameters)
    assert all(torch.equal(merged[name], tensor) for name, tensor in states["a"].items())


@pytest.mark.parametrize("name", ["aim_aim", "aim_aim_ties"])
def test_aim_over_aim_is_one_line(name: str, family: Path, tmp_path: Path) -> None:
    found = {
        "merge_method": name,
        "base_model": str(family / "base"),
        "models": [{"model": str(family / "a"), "parameters": {"weight": 1.0}}],
        "parameters": {"activation_stats": str(family / "stats")},
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(found))
    done = CliRunner().invoke(
        mergekit_yaml, [str(tmp_path / "config.yml"), str(tmp_path / "out"), "--quiet"]
    )
    assert done.exit_code == 2
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert f"{name}: {name.removeprefix('aim_')} relaxes its merge already" in line


@pytest.mark.parametrize("name", WRAPPED)
def test_methods_can_be_pickled_and_copied(name: str, family: Path) -> None:
    method = merge_methods.get(name)
    for twin in (pickle.loads(pickle.dumps(method)), copy.copy(method), copy.deepcopy(method)):
        assert type(twin) is type(method)
        assert twin is not method
        assert twin.spec.name == name
        assert [p.name for p in twin.spec.parameters] == [p.name for p in method.spec.parameters]
        assert twin.spec.contract == method.spec.contract


def test_a_pickled_method_merges_as_the_registered_one(family: Path) -> None:
    states = {name: weights(family / name) for name in ("base", "a")}
    parameters = {"activation_stats": str(family / "stats"), "omega": 0.2}
    twin = pickle.loads(pickle.dumps(merge_methods.get("aim_arm")))
    found, wanted = (
        merge_state_dicts(states, method, base="base", parameters=parameters)
        for method in (twin, "aim_arm")
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
