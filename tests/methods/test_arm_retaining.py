"""``arm`` with ``task_stats``: a step that does not forget, against dense float64 algebra."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.merge_methods import merge_state_dicts
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import save_file
from torch import Tensor

from mergekit_arm.errors import InputError
from tests.support.merges import as_merged, refused, run, weights
from tests.support.models import perturbed, tiny_experts
from tests.support.moments_reference import Stored, turned
from tests.support.stored import Folder
from tests.support.streams import write_tokens

Measure = Callable[..., Path]


@pytest.fixture(scope="module")
def task_stats(family: Path, tmp_path_factory: pytest.TempPathFactory, measure: Measure) -> Path:
    """Statistics of the base on other text."""
    folder = tmp_path_factory.mktemp("task")
    tokens = write_tokens(folder / "task.jsonl", 8, rows=3)
    return measure(family / "base", folder / "stats", dataset=str(tokens))


def document(family: Path, task: Path, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": "arm",
        "base_model": str(family / "base"),
        "models": [
            {"model": str(family / "a"), "parameters": {"learning_rate": 0.7}},
            {"model": str(family / "b"), "parameters": {"learning_rate": 0.4}},
        ],
        "parameters": {
            "activation_stats": str(family / "stats"),
            "task_stats": str(task),
            **parameters,
        },
        "dtype": "float32",
    }


def merge(found: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    return weights(run(mergekit_yaml, yaml.safe_dump(found), folder))


def expected(
    folder: Path,
    name: str,
    stats: tuple[Path, Path],
    rates: dict[str, float],
    retain: float = 0.3,
    turn: float = 1.0,
) -> tuple[Tensor, bool]:
    """The stepped weight, and whether it was turned; ``stats``: of the task, of general text."""
    base = as_merged(folder / "base")[name].double()
    tasks = {model: as_merged(folder / model)[name].double() - base for model in rates}
    task, general = (Folder.open(path).stored(name) for path in stats)
    if task is None or general is None:
        return base + sum(rate * tasks[model] for model, rate in rates.items()), False
    result = base.clone()
    for model, rate in rates.items():
        if base.ndim == 2:
            result += rate * _turned(tasks[model], task, general, retain, turn)
            continue
        for expert in range(len(base)):
            moments = [
                Stored(one.diagonal[expert], one.basis, one.eigenvalues) for one in (task, general)
            ]
            if not (moments[0].diagonal.any() or moments[1].diagonal.any()):
                result[expert] += rate * tasks[model][expert]
            else:
                result[expert] += rate * _turned(tasks[model][expert], *moments, retain, turn)
    return result, True


def _turned(task: Tensor, first: Stored, second: Stored, retain: float, turn: float) -> Tensor:
    found = turned(task.numpy(), first.dense(0.9), second.dense(0.9), retain, turn)
    return torch.from_numpy(found)


@pytest.mark.parametrize(
    "settings", [{}, {"retain": 3.0, "turn": 0.4}, {"retain": 0.0}], ids=["defaults", "part", "0"]
)
def test_against_dense_algebra(
    settings: dict[str, float], family: Path, task_stats: Path, tmp_path: Path
) -> None:
    merged = merge(document(family, task_stats, **settings), tmp_path)
    count = 0
    for name, tensor in merged.items():
        wanted, was_turned = expected(
            family, name, (task_stats, family / "stats"), {"a": 0.7, "b": 0.4}, **settings
        )
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-4, atol=5e-6, msg=name)
        count += was_turned
    assert count == 14  # seven matrices in each of two layers


def test_a_turn_of_nothing_is_task_arithmetic(
    family: Path, task_stats: Path, tmp_path: Path
) -> None:
    found = document(family, task_stats, turn=0)
    stepped = merge(found, tmp_path / "arm")
    plain = document(family, task_stats, rotation=0.0)
    del plain["parameters"]["task_stats"]
    for name, tensor in merge(plain, tmp_path / "plain").items():
        assert torch.equal(stepped[name], tensor), name


def test_the_same_text_twice_changes_no_direction(family: Path, tmp_path: Path) -> None:
    stepped = merge(document(family, family / "stats"), tmp_path / "arm")
    plain = document(family, family / "stats", rotation=0.0)
    del plain["parameters"]["task_stats"]
    for name, tensor in merge(plain, tmp_path / "plain").items():
        torch.testing.assert_close(stepped[name], tensor, rtol=1e-5, atol=2e-6, msg=name)


def test_rows_keep_their_lengths(family: Path, task_stats: Path, tmp_path: Path) -> None:
    found = document(family, task_stats)
    found["models"] = found["models"][:1]
    merged = merge(found, tmp_path)
    base, other = weights(family / "base"), weights(family / "a")
    for name, tensor in merged.items():
        if "_proj" in name:
            lengths = [(one - base[name]).norm(dim=1) for one in (tensor, other[name])]
            torch.testing.assert_close(lengths[0], 0.7 * lengths[1], rtol=1e-4, atol=1e-6)
            assert not torch.allclose(tensor, base[name] + 0.7 * (other[name] - base[name]))


def test_experts_by_their_own_energies(tmp_path: Path, measure: Measure) -> None:
    base = tiny_experts(3)
    base.save_pretrained(tmp_path / "base")
    perturbed(base, 1).save_pretrained(tmp_path / "a")
    stats = {}
    for name, seed in (("stats", 1), ("task", 2)):
        tokens = write_tokens(tmp_path / f"{name}.jsonl", seed)
        stats[name] = measure(tmp_path / "base", tmp_path / name, dataset=str(tokens))
    found = document(tmp_path, stats["task"])
    found["models"] = found["models"][:1]
    merged = merge(found, tmp_path / "merge")
    experts = [name for name in merged if ".experts." in name]
    assert len(experts) == 4
    for name in experts:
        wanted, was_turned = expected(tmp_path, name, (stats["task"], stats["stats"]), {"a": 0.7})
        assert was_turned
        torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-4, atol=5e-6, msg=name)


def test_rows_of_which_nothing_is_left_are_said_once(
    family: Path, task_stats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They differ in one channel only, which the task never excites."""
    shutil.copytree(task_stats, tmp_path / "task")
    folder = Folder.open(task_stats)
    for key, tensor in folder.tensors.items():
        if key.endswith(".square_sum"):
            tensor[5] = 0
    save_file(folder.tensors, tmp_path / "task" / "model.safetensors")
    states = {"base": weights(family / "base"), "a": weights(family / "base")}
    for name, tensor in states["a"].items():
        if "q_proj" in name:
            tensor[:3, 5] += 1.0
    parameters = {
        "activation_stats": str(family / "stats"),
        "task_stats": str(tmp_path / "task"),
        "learning_rate": 0.5,
    }
    merged = merge_state_dicts(states, "arm", parameters=parameters, base="base")
    (said,) = [r.message for r in caplog.records if "keep their direction" in r.message]
    assert "self_attn.q_proj.weight: 3 rows keep their direction" in said
    for name, tensor in states["base"].items():
        wanted = tensor + 0.5 * (states["a"][name] - tensor)
        torch.testing.assert_close(merged[name], wanted, msg=name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rotation": -0.4}, "arm: rotation has no meaning with task_stats: remove it"),
        ({"alignment": 0.0}, "arm: alignment has no meaning with task_stats: remove it"),
        ({"energy": 0.5}, "arm: energy has no meaning with task_stats: remove it"),
        ({"retain": -1}, "retain must lie in [0, 1000]"),
        ({"turn": 1.1}, "turn must lie in [0, 1]"),
        ({"task_stats": "./nowhere"}, "no such directory"),
        ({"task_stats": 3}, "task_stats must be a directory or a Hub name, not 3"),
        ({"activation_stats": None}, "activation_stats must be a directory"),
    ],
)
def test_refused_before_anything_is_written(
    changes: dict[str, Any], words: str, family: Path, task_stats: Path, tmp_path: Path
) -> None:
    found = document(family, task_stats, **changes)
    found["parameters"] = {k: v for k, v in found["parameters"].items() if v is not None}
    assert words in refused(yaml.safe_dump(found), tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["retain", "turn"])
def test_what_needs_task_stats_is_refused_without(name: str, family: Path, tmp_path: Path) -> None:
    found = document(family, family / "stats", **{name: 0.5})
    del found["parameters"]["task_stats"]
    line = refused(yaml.safe_dump(found), tmp_path)
    assert f"arm: {name} has no meaning without task_stats: remove it, or add task_stats" in line


def test_task_stats_of_another_model_or_without_subspaces(
    family: Path, task_stats: Path, tmp_path: Path, measure: Measure
) -> None:
    measure(family / "a", tmp_path / "other")
    line = refused(yaml.safe_dump(document(family, tmp_path / "other")), tmp_path)
    assert "another model or revision" in line
    measure(family / "base", tmp_path / "few", statistics=("importance",))
    line = refused(yaml.safe_dump(document(family, tmp_path / "few")), tmp_path)
    assert f"{tmp_path / 'few'} hold importance and no subspace" in line
    assert not (tmp_path / "out").exists()


def test_in_memory_it_is_refused_alike(family: Path, task_stats: Path) -> None:
    states = {name: weights(family / name) for name in ("base", "a")}
    parameters = {"activation_stats": str(family / "stats"), "task_stats": str(task_stats)}
    with pytest.raises(InputError, match="rotation has no meaning with task_stats"):
        merge_state_dicts(states, "arm", parameters={**parameters, "rotation": -0.4}, base="base")


def test_slices_use_both_statistics_of_the_layer_that_was_taken(
    family: Path, task_stats: Path, tmp_path: Path
) -> None:
    found = document(family, task_stats)
    models = [{"model": found["base_model"]}, *found.pop("models")]
    found["slices"] = [{"sources": [{**one, "layer_range": [1, 2]} for one in models]}]
    for name, tensor in merge(found, tmp_path).items():
        if "layers.0" in name:
            wanted, _ = expected(
                family,
                name.replace("layers.0", "layers.1"),
                (task_stats, family / "stats"),
                {"a": 0.7, "b": 0.4},
            )
            torch.testing.assert_close(tensor.double(), wanted, rtol=1e-4, atol=5e-6, msg=name)


def test_aim_over_it(family: Path, task_stats: Path, tmp_path: Path) -> None:
    found = document(family, task_stats, omega=1.0) | {"merge_method": "aim_arm"}
    plain = merge(document(family, task_stats), tmp_path / "plain")
    for name, tensor in merge(found, tmp_path / "aim").items():
        assert torch.equal(tensor, plain[name])
