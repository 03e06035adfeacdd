"""``merge_method: arm`` through mergekit: the exact cases, the grammar, the refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.merge_methods import merge_state_dicts
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file

from mergekit_arm.errors import InputError
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.kinds.subspace import SUBSPACE
from mergekit_arm.statistics.read import Statistics
from tests.support.models import tiny_llama

ROTATED = ("_proj.weight",)


def states(family: Path, *names: str) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(family / name / "model.safetensors") for name in ("base", *names)}


def arm(
    inputs: dict[str, dict[str, torch.Tensor]], stats: Path, **parameters: Any
) -> dict[str, torch.Tensor]:
    return merge_state_dicts(
        inputs, "arm", parameters={"activation_stats": str(stats), **parameters}, base="base"
    )


def explicit_step(
    weight: torch.Tensor,
    checkpoint: torch.Tensor,
    basis: torch.Tensor,
    rate: float,
    rotation: float,
) -> torch.Tensor:
    """ARM.md's step 3 and 4, row by row in float64, with explicit projections."""
    weight, checkpoint, basis = weight.double(), checkpoint.double(), basis.double()
    projector = basis @ basis.T
    rows = []
    for row, target in zip(weight, checkpoint, strict=True):
        task = target - row
        inside = projector @ task
        outside = task - inside
        angle = torch.atan2(outside.norm(), inside.norm())
        turned = (
            angle * (1 - rotation)
            if rotation >= 0
            else angle + abs(rotation) * (torch.pi / 2 - angle)
        )
        rows.append(
            row
            + rate
            * task.norm()
            * (
                torch.cos(turned) * inside / inside.norm()
                + torch.sin(turned) * outside / outside.norm()
            )
        )
    return torch.stack(rows)


@pytest.mark.parametrize("rotation", [-1.0, -0.4, 0.3, 1.0])
def test_against_explicit_projections(rotation: float, family: Path) -> None:
    inputs = states(family, "a")
    merged = arm(inputs, family / "stats", rotation=rotation, learning_rate=0.7, energy=0.9)
    statistics = Statistics("stats", family / "stats")
    rotated = 0
    for name, weight in inputs["base"].items():
        record = statistics.metadata.weights[name]
        basis = (
            SUBSPACE.basis(statistics, record, 0.9) if record.site and weight.ndim == 2 else None
        )
        if basis is None:
            wanted = weight.double() + 0.7 * (inputs["a"][name].double() - weight.double())
        else:
            rotated += 1
            assert 0 < basis.shape[1] < basis.shape[0]
            wanted = explicit_step(weight, inputs["a"][name], basis, 0.7, rotation)
        torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-4, atol=1e-6, msg=name)
    assert rotated == 14  # seven matrices in each of two layers


def test_without_turning_it_is_task_arithmetic(family: Path) -> None:
    inputs = states(family, "a", "b")
    rates = {"a": 0.3, "b": 0.6}
    stepped = arm(inputs, family / "stats", rotation=0.0, learning_rate=rates)
    plain = merge_state_dicts(inputs, "task_arithmetic", parameters={"weight": rates}, base="base")
    for name in plain:
        torch.testing.assert_close(stepped[name], plain[name], rtol=1e-6, atol=1e-7)


def test_a_full_step_without_turning_is_the_checkpoint(family: Path) -> None:
    inputs = states(family, "a")
    stepped = arm(inputs, family / "stats", rotation=0.0, learning_rate=1.0)
    assert all(torch.equal(stepped[name], inputs["a"][name]) for name in stepped)


def test_several_checkpoints_add(family: Path) -> None:
    both = arm(states(family, "a", "b"), family / "stats", learning_rate={"a": 0.3, "b": 0.6})
    one = arm(states(family, "a"), family / "stats", learning_rate=0.3)
    two = arm(states(family, "b"), family / "stats", learning_rate=0.6)
    base = states(family)["base"]
    for name in both:
        wanted = one[name] + two[name] - base[name]
        torch.testing.assert_close(both[name], wanted, rtol=1e-5, atol=1e-6)


def test_alignment_needs_statistics_of_every_input(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    inputs = states(family, "a")
    with pytest.raises(InputError, match="alignment > 0 needs statistics of a itself"):
        arm(inputs, family / "stats", alignment=0.5)
    measure(family / "a", tmp_path / "a-stats")
    own = {"base": str(family / "stats"), "a": str(tmp_path / "a-stats")}
    aligned = merge_state_dicts(
        inputs, "arm", parameters={"activation_stats": own, "alignment": 1.0}, base="base"
    )
    plain = arm(inputs, family / "stats")
    moved = [name for name in plain if not torch.equal(aligned[name], plain[name])]
    assert len(moved) == 14
    for name in plain:  # a rotation of the rows: their steps keep their lengths
        steps = [(merged[name] - inputs["base"][name]).norm(dim=-1) for merged in (aligned, plain)]
        torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-6)


def test_aim_over_arm(family: Path) -> None:
    inputs = states(family, "a")
    parameters = {"activation_stats": str(family / "stats"), "rotation": -0.4}
    plain = merge_state_dicts(inputs, "arm", parameters=parameters, base="base")
    both = merge_state_dicts(
        inputs, "aim_arm", parameters={**parameters, "omega": 0.2}, base="base"
    )
    statistics = Statistics("stats", family / "stats")
    name = "model.layers.1.mlp.down_proj.weight"
    importance = IMPORTANCE.values(statistics, statistics.metadata.weights[name], "mean_abs")
    gain = 1 - 0.8 * importance / importance.max()
    base = inputs["base"][name]
    torch.testing.assert_close(both[name], base + (plain[name] - base) * gain)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("rotation", 1.2),
        ("alignment", -0.1),
        ("energy", 0.0),
        ("learning_rate", 0.0),
        ("learning_rate", 2.5),
        ("rotation", "left"),
    ],
)
def test_parameters_outside_their_range(parameter: str, value: Any, family: Path) -> None:
    with pytest.raises(InputError, match=f"{parameter} must lie in"):
        arm(states(family, "a"), family / "stats", **{parameter: value})


def test_more_energy_than_was_stored(family: Path) -> None:
    with pytest.raises(InputError, match=r"calibrate again with --energy 0\.999"):
        arm(states(family, "a"), family / "stats", energy=0.999)


def test_statistics_without_subspaces(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    measure(family / "base", tmp_path / "stats", statistics=("importance",))
    with pytest.raises(InputError, match="calibrate again with --statistics all"):
        arm(states(family, "a"), tmp_path / "stats")


def yaml_merge(config: dict[str, Any], folder: Path) -> tuple[int, str, Path]:
    folder.mkdir(exist_ok=True)
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    done = CliRunner().invoke(
        mergekit_yaml, [str(folder / "config.yml"), str(folder / "out"), "--quiet"]
    )
    return done.exit_code, done.output, folder / "out" / "model.safetensors"


def config(family: Path, **changes: Any) -> dict[str, Any]:
    return {
        "merge_method": "arm",
        "base_model": str(family / "base"),
        "models": [{"model": str(family / "a"), "parameters": {"learning_rate": 0.7}}],
        "parameters": {
            "activation_stats": str(family / "stats"),
            **changes.pop("parameters", {}),
        },
        "dtype": "float32",
        **changes,
    }


def test_through_mergekit_yaml(family: Path, tmp_path: Path) -> None:
    code, output, path = yaml_merge(config(family), tmp_path)
    assert code == 0, output
    wanted = arm(states(family, "a"), family / "stats", learning_rate=0.7)
    found = load_file(path)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_gradients_and_filters(family: Path, tmp_path: Path) -> None:
    mixed = config(
        family,
        parameters={
            "rotation": [{"filter": "mlp", "value": [-1.0, 0.0]}, {"value": 0.5}],
            "energy": [0.5, 0.9],
        },
    )
    code, output, path = yaml_merge(mixed, tmp_path)
    assert code == 0, output
    found = load_file(path)
    inputs = states(family, "a")
    for layer, energy in ((0, 0.5), (1, 0.9)):
        for part, rotation in (("mlp", -1.0 if layer == 0 else 0.0), ("self_attn", 0.5)):
            wanted = arm(
                inputs, family / "stats", rotation=rotation, energy=energy, learning_rate=0.7
            )
            for name in (n for n in found if f"layers.{layer}.{part}" in n):
                torch.testing.assert_close(found[name], wanted[name], msg=name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameters": {"alignment": 0.5}}, "alignment > 0 needs statistics"),
        ({"parameters": {"activation_stats": "./nowhere"}}, "no such directory"),
        ({"parameters": {"rotation": 3}}, "rotation must lie in [-1, 1]"),
    ],
)
def test_refused_with_one_line_before_anything_is_written(
    changes: dict[str, Any], words: str, family: Path, tmp_path: Path
) -> None:
    code, output, path = yaml_merge(config(family, **changes), tmp_path)
    assert code == 2, output
    assert words in output
    assert "Traceback" not in output
    assert not path.exists()


def test_statistics_of_another_model(family: Path, tmp_path: Path) -> None:
    tiny_llama(77).save_pretrained(tmp_path / "other")
    wrong = config(family, base_model=str(tmp_path / "other"))
    code, output, path = yaml_merge(wrong, tmp_path)
    assert code == 2
    assert "another model or revision" in output
    assert not path.exists()


def test_slices_use_the_layer_that_was_taken(family: Path, tmp_path: Path) -> None:
    sliced = config(family)
    del sliced["models"]
    sliced["slices"] = [
        {"sources": [
            {"model": str(family / "base"), "layer_range": [1, 2]},
            {"model": str(family / "a"), "layer_range": [1, 2],
             "parameters": {"learning_rate": 0.7}},
        ]}
    ]  # fmt: skip
    code, output, path = yaml_merge(sliced, tmp_path)
    assert code == 0, output
    wanted = arm(states(family, "a"), family / "stats", learning_rate=0.7)
    for name, tensor in load_file(path).items():
        if "layers.0" in name:
            assert torch.equal(tensor, wanted[name.replace("layers.0", "layers.1")]), name
