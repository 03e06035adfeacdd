"""What must be refused, with one line, by the real ``mergekit-yaml``, before it writes a tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file, save_file

from tests.support.edits import edit
from tests.support.models import perturbed, tiny_llama


def merge(config: dict[str, Any], folder: Path) -> tuple[int, str, Path]:
    folder.mkdir(exist_ok=True)
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    done = CliRunner().invoke(
        mergekit_yaml, [str(folder / "config.yml"), str(folder / "out"), "--quiet"]
    )
    return done.exit_code, done.output, folder / "out"


def config(family: Path, stats: Path | str | None = None, **changes: Any) -> dict[str, Any]:
    parameters = {"activation_stats": str(stats or family / "stats"), "omega": 0.3}
    return {
        "merge_method": "aim",
        "base_model": str(family / "base"),
        "models": [{"model": str(family / "a"), "parameters": {"weight": 1.0}}],
        "parameters": {**parameters, **changes.pop("parameters", {})},
        "dtype": "float32",
        **changes,
    }


def assert_refused(result: tuple[int, str, Path], *words: str) -> None:
    code, output, out = result
    lines = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert code == 2, output
    assert len(lines) == 1, output
    assert "Traceback" not in output
    for word in words:
        assert word in lines[0]
    assert not list(out.glob("*.safetensors"))


def test_the_plain_merge_works(family: Path, tmp_path: Path) -> None:
    code, output, out = merge(config(family), tmp_path)
    assert code == 0, output
    assert (out / "model.safetensors").is_file()


def test_wrong_model(family: Path, tmp_path: Path) -> None:
    tiny_llama(77).save_pretrained(tmp_path / "other")
    wrong = config(family, base_model=str(tmp_path / "other"))
    assert_refused(merge(wrong, tmp_path), "another model or revision", str(family / "base"))


def test_wrong_revision_that_differs_in_one_weight(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "base", tmp_path / "revised")
    weights = load_file(tmp_path / "revised" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.001
    save_file(weights, tmp_path / "revised" / "model.safetensors", metadata={"format": "pt"})
    wrong = config(family, base_model=str(tmp_path / "revised"))
    assert_refused(merge(wrong, tmp_path), "layers.1.mlp.down_proj", "another model or revision")


def test_wrong_width(family: Path, tmp_path: Path) -> None:
    """Alike in every weight but those that a wider feed-forward layer makes larger."""
    base = tiny_llama(0)
    wider = type(base)(type(base.config)(**(base.config.to_dict() | {"intermediate_size": 64})))
    narrow = {name: value for name, value in base.state_dict().items() if "mlp" not in name}
    wider.load_state_dict(wider.state_dict() | narrow)
    wider.save_pretrained(tmp_path / "wide")
    perturbed(wider, 1).save_pretrained(tmp_path / "wide-a")
    wrong = config(
        family,
        base_model=str(tmp_path / "wide"),
        models=[{"model": str(tmp_path / "wide-a"), "parameters": {"weight": 1.0}}],
    )
    assert_refused(merge(wrong, tmp_path), "mlp.", "where it has shape [", "base_model's has [")


def test_slices_find_the_layer_by_its_probe(family: Path, tmp_path: Path) -> None:
    sliced = config(family)
    del sliced["models"]
    sliced["slices"] = [
        {"sources": [
            {"model": str(family / "base"), "layer_range": [1, 2]},
            {"model": str(family / "a"), "layer_range": [1, 2], "parameters": {"weight": 1.0}},
        ]}
    ]  # fmt: skip
    code, output, out = merge(sliced, tmp_path)
    assert code == 0, output
    _, _, whole = merge(config(family), tmp_path / "whole")
    found, wanted = (load_file(path / "model.safetensors") for path in (out, whole))
    # The only layer of the output is the second of the models, with the second's statistics.
    for name, tensor in found.items():
        if "layers.0" in name:
            assert torch.equal(tensor, wanted[name.replace("layers.0", "layers.1")]), name


def test_slices_of_another_model_are_refused(family: Path, tmp_path: Path) -> None:
    tiny_llama(77).save_pretrained(tmp_path / "other")
    sliced = config(family, base_model=str(tmp_path / "other"))
    del sliced["models"]
    sliced["slices"] = [
        {"sources": [
            {"model": str(tmp_path / "other"), "layer_range": [1, 2]},
            {"model": str(family / "a"), "layer_range": [1, 2], "parameters": {"weight": 1.0}},
        ]}
    ]  # fmt: skip
    assert_refused(merge(sliced, tmp_path), "another model or revision")


def edited(family: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    stats = tmp_path / "stats"
    shutil.copytree(family / "stats", stats)
    return edit(stats, change)


def test_missing_weight(family: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    stats = edited(family, tmp_path, lambda metadata: metadata["weights"].pop(name))
    assert_refused(merge(config(family, stats), tmp_path), name, "no such weight")


def test_a_weight_never_measured_needs_consent_by_name(family: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def edit(metadata: dict[str, Any]) -> None:
        record = metadata["weights"][name]
        del record["site"]
        record["reason"] = "never used on this data"

    stats = edited(family, tmp_path, edit)
    assert_refused(merge(config(family, stats), tmp_path), name, "never used", "omega")
    consent = [{"filter": name, "value": 1.0}, {"value": 0.3}]
    code, output, out = merge(config(family, stats, parameters={"omega": consent}), tmp_path)
    assert code == 0, output
    merged = load_file(out / "model.safetensors")[name]
    torch.testing.assert_close(merged, load_file(family / "a" / "model.safetensors")[name])


def test_newer_format(family: Path, tmp_path: Path) -> None:
    stats = edited(family, tmp_path, lambda metadata: metadata.update(format_version=9))
    assert_refused(merge(config(family, stats), tmp_path), "format 9", "pip install -U")


def test_damaged_metadata(family: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    shutil.copytree(family / "stats", stats)
    text = (stats / "activation_stats.json").read_text()
    (stats / "activation_stats.json").write_text(text[: len(text) // 2])
    assert_refused(merge(config(family, stats), tmp_path), "damaged")


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_truncated_tensors(keep: float, family: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    shutil.copytree(family / "stats", stats)
    data = (stats / "model.safetensors").read_bytes()
    size = int(keep * len(data)) if keep < 1 else int(keep)
    (stats / "model.safetensors").write_bytes(data[:size])
    assert_refused(merge(config(family, stats), tmp_path), "cannot read its tensors")


def test_no_such_directory(family: Path, tmp_path: Path) -> None:
    assert_refused(merge(config(family, tmp_path / "stast"), tmp_path), "no such directory")


def test_not_a_statistics_directory(family: Path, tmp_path: Path) -> None:
    assert_refused(merge(config(family, family / "base"), tmp_path), "activation_stats.json")


def test_on_the_hub_without_a_network(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused(merge(config(family, "nobody/stats"), tmp_path), "nobody/stats", "Hub")


def test_statistics_left_out(family: Path, tmp_path: Path) -> None:
    forgotten = config(family)
    del forgotten["parameters"]["activation_stats"]
    assert_refused(merge(forgotten, tmp_path), "activation_stats", "calibrate")


def test_omega_out_of_range(family: Path, tmp_path: Path) -> None:
    assert_refused(merge(config(family, parameters={"omega": 1.5}), tmp_path), "omega", "[0, 1]")


def test_not_finite(family: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    shutil.copytree(family / "stats", stats)
    tensors = load_file(stats / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.abs_sum"][3] = float("nan")
    save_file(tensors, stats / "model.safetensors")
    code, output, _ = merge(config(family, stats), tmp_path)
    assert code == 2
    assert "not finite" in output
    assert "Traceback" not in output


def test_omega_gradient_and_filter(family: Path, tmp_path: Path) -> None:
    by_layer = [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.5}]
    code, output, out = merge(config(family, parameters={"omega": by_layer}), tmp_path)
    assert code == 0, output
    found = load_file(out / "model.safetensors")
    for layer, mlp in ((0, 0.0), (1, 1.0)):
        for part, omega in ((f"layers.{layer}.mlp", mlp), (f"layers.{layer}.self_attn", 0.5)):
            _, _, plain = merge(
                config(family, parameters={"omega": omega}), tmp_path / f"{layer}{omega}"
            )
            wanted = load_file(plain / "model.safetensors")
            for name in (name for name in found if part in name):
                assert torch.equal(found[name], wanted[name]), name
