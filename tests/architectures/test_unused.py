"""What the calibration data never reaches is listed, and a merge asks before it goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file

from mergekit_arm.calibration.calibrate import CalibrationOptions, calibrate
from mergekit_arm.statistics.format import NEVER_USED
from mergekit_arm.statistics.read import Statistics
from tests.architectures.matrix import publish, write_rows
from tests.architectures.zoo import ZOO


def merge(folder: Path, omega: object) -> Result:
    config = {
        "merge_method": "aim",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "other"), "parameters": {"weight": 1.0}}],
        "parameters": {"activation_stats": str(folder / "stats"), "omega": omega},
        "dtype": "float32",
    }
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    arguments = [str(folder / "config.yml"), str(folder / "merged"), "--quiet"]
    return CliRunner().invoke(mergekit_yaml, arguments)


@pytest.mark.parametrize(
    ("file", "filters"),
    [
        ("gemma3vl", ["vision_tower", "multi_modal_projector"]),
        ("mistral3", ["vision_tower", "multi_modal_projector"]),
        ("qwen2_5_vl", ["visual"]),
    ],
)
def test_a_vision_tower_without_images(file: str, filters: list[str], tmp_path: Path) -> None:
    (architecture,) = [one for one in ZOO if one.file == file]
    publish(architecture, tmp_path)
    text_only = dataclasses.replace(architecture, extra=lambda ids: {}, image=())
    write_rows(text_only, tmp_path / "rows.jsonl")
    calibrate(
        CalibrationOptions(
            model=str(tmp_path / "base"),
            out=str(tmp_path / "stats"),
            dataset=str(tmp_path / "rows.jsonl"),
            dtype="float32",
        )
    )
    weights = Statistics("stats", tmp_path / "stats").metadata.weights
    unused = {name for name, record in weights.items() if record.reason == NEVER_USED}
    vision = {name for name in weights if any(part in name for part in filters)}
    assert unused
    assert unused <= vision
    assert not any(weights[name].site for name in vision)
    assert all(record.site or record.reason for record in weights.values())
    done = merge(tmp_path, 0.3)
    assert done.exit_code == 2, done.output
    assert "never used on this data" in done.output
    tower = [{"filter": part, "value": 1.0} for part in filters]
    done = merge(tmp_path, [*tower, {"value": 0.3}])
    assert done.exit_code == 0, done.output or repr(done.exception)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    other = load_file(tmp_path / "other" / "model.safetensors")
    assert unused & set(merged)
    for name in unused & set(merged):
        torch.testing.assert_close(merged[name], other[name])
