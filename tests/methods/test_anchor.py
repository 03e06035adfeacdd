"""Under AIM, what a user wrote for the base of a method that takes none counts, or is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.merge_methods import merge_state_dicts
from mergekit.scripts.run_yaml import main as mergekit_yaml
from torch import Tensor

from mergekit_arm.errors import InputError
from mergekit_arm.methods.anchor import ABSENT
from tests.support.merges import refused, relaxed, run, weights


def document(family: Path, *models: tuple[str, Any], **changes: Any) -> dict[str, Any]:
    """A merge of ``models``, each with its weight or None."""
    listed: list[dict[str, Any]] = []
    for name, weight in models:
        listed.append({"model": str(family / name)})
        if weight is not None:
            listed[-1]["parameters"] = {"weight": weight}
    return {
        "merge_method": "aim_linear",
        "base_model": str(family / "base"),
        "models": listed,
        "parameters": {"activation_stats": str(family / "stats"), "omega": 1.0},
        "dtype": "float32",
        **changes,
    }


def merge(found: dict[str, Any], folder: Path, **changes: Any) -> dict[str, Tensor]:
    return weights(run(mergekit_yaml, yaml.safe_dump({**found, **changes}), folder))


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_base_with_a_weight_is_an_input(family: Path, tmp_path: Path) -> None:
    for number, models in enumerate(
        ([("base", 0.75), ("a", 0.25)], [("a", 0.3), ("base", [0.2, 0.9]), ("b", 0.4)])
    ):
        found = document(family, *models)
        plain = merge(found, tmp_path / f"{number}-plain", merge_method="linear")
        assert_same(merge(found, tmp_path / f"{number}-aim"), plain)
        alone = merge(
            document(family, *(one for one in models if one[0] != "base")),
            tmp_path / f"{number}-alone",
        )
        assert any(not torch.equal(alone[name], plain[name]) for name in plain)


def test_it_is_relaxed_towards_the_base_then(family: Path, tmp_path: Path) -> None:
    found = document(family, ("base", 0.75), ("a", 0.25))
    plain = merge(found, tmp_path / "plain", merge_method="linear")
    found["parameters"]["omega"] = 0.3
    base = weights(family / "base")
    for name, tensor in merge(found, tmp_path / "aim").items():
        wanted = relaxed(family, name, base[name], plain[name])
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("listed", [False, True])
def test_a_base_without_a_weight_is_the_anchor_only(
    listed: bool, family: Path, tmp_path: Path
) -> None:
    models = [("a", 0.25), ("b", 0.5)]
    found = document(family, *([("base", None)] if listed else []), *models)
    plain = document(family, *models, merge_method="linear")
    del plain["base_model"]
    assert_same(merge(found, tmp_path / "aim"), merge(plain, tmp_path / "plain"))


def test_a_weight_for_all_counts_for_a_base_that_is_listed(family: Path, tmp_path: Path) -> None:
    found = document(family, ("base", None), ("a", None), ("b", None))
    found["parameters"]["weight"] = 0.5
    plain = merge(found, tmp_path / "plain", merge_method="linear")
    assert_same(merge(found, tmp_path / "aim"), plain)


def test_a_weight_that_may_or_may_not_be_the_base_s_is_refused(
    family: Path, tmp_path: Path
) -> None:
    """mergekit's plan looks the same for all of these."""
    shared = document(family, ("a", None), ("b", None))
    shared["parameters"]["weight"] = 0.5
    last = document(family, ("a", 0.25), ("base", 0.75))
    for found in (shared, last):
        line = refused(yaml.safe_dump(found), tmp_path)
        assert "weight: does base_model take part in the linear merge?" in line
        assert "list it first under models" in line


def test_a_model_without_a_weight_is_refused(family: Path, tmp_path: Path) -> None:
    line = refused(yaml.safe_dump(document(family, ("base", 0.5), ("a", None))), tmp_path)
    assert f"{family / 'a'} has no weight" in line


def test_slices_count_as_models_do(family: Path, tmp_path: Path) -> None:
    found = document(family, ("base", 0.75), ("a", 0.25))
    sources = [{**model, "layer_range": [1, 2]} for model in found.pop("models")]
    found["slices"] = [{"sources": sources}]
    plain = merge(found, tmp_path / "plain", merge_method="linear")
    assert_same(merge(found, tmp_path / "aim"), plain)


@pytest.mark.parametrize("base_scale", [None, 0.5])
def test_passthrough_takes_one_model(
    base_scale: float | None, family: Path, tmp_path: Path
) -> None:
    found = document(family, ("base", None), ("a", None), merge_method="aim_passthrough")
    found["models"][1]["parameters"] = {"scale": 2.0}
    if base_scale is not None:
        found["models"][0]["parameters"] = {"scale": base_scale}
        assert "aim_passthrough: Merge method" in refused(yaml.safe_dump(found), tmp_path)
        return
    wanted = {name: 2 * tensor for name, tensor in weights(family / "a").items()}
    assert_same(merge(found, tmp_path / "aim"), wanted)


@pytest.mark.parametrize(
    ("given", "effective"),
    [
        (0.5, [0.0, 0.5, 0.5]),
        ([0.2, 0.6], [0.0, 0.2, 0.6]),
        ([0.3, 0.2, 0.6], [0.3, 0.2, 0.6]),
        ({"a": 0.2, "b": 0.6}, [0.0, 0.2, 0.6]),
        ({"base": 0.3, "a": 0.2, "b": 0.6}, [0.3, 0.2, 0.6]),
    ],
)
def test_in_memory(given: Any, effective: list[float], family: Path) -> None:
    states = {name: weights(family / name) for name in ("base", "a", "b")}
    parameters = {"activation_stats": str(family / "stats"), "omega": 1.0, "weight": given}
    found = merge_state_dicts(states, "aim_linear", base="base", parameters=parameters)
    for name, tensor in found.items():
        total = sum(
            weight * states[model][name].double()
            for model, weight in zip(states, effective, strict=True)
        )
        torch.testing.assert_close(tensor.double(), total / sum(effective), rtol=1e-5, atol=1e-6)


def test_in_memory_a_weight_cannot_be_left_out(family: Path) -> None:
    states = {name: weights(family / name) for name in ("base", "a")}
    parameters = {"activation_stats": str(family / "stats"), "omega": 1.0}
    with pytest.raises(InputError, match="a has no weight"):
        merge_state_dicts(states, "aim_linear", base="base", parameters=parameters)


def test_absent_is_one_object() -> None:
    assert pickle.loads(pickle.dumps(ABSENT)) is ABSENT
    assert copy.deepcopy(ABSENT) is ABSENT
