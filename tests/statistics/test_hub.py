"""Hub references, from a cache and without a network (no machine of ours has one)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_arm.calibration.calibrate import CalibrationOptions, calibrate
from tests.support.merges import OMEGA, assert_relaxed, config, refused, run, weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def publish(folder: Path, name: str, cache: Path) -> None:
    """Lay ``folder`` into a Hub cache as the client would after downloading ``name``."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


@pytest.mark.parametrize("reference", ["someone/stats", f"someone/stats@{COMMIT}"])
def test_merge_with_published_statistics(
    reference: str, family: Path, cache: Path, tmp_path: Path
) -> None:
    publish(family / "stats", "someone/stats", cache)
    published = config(family, parameters={"activation_stats": reference, "omega": OMEGA})
    out = run(
        mergekit_yaml, yaml.safe_dump(published), tmp_path, "--transformers-cache", str(cache)
    )
    found = weights(out)
    assert found.keys() == weights(family / "base").keys()
    for name, tensor in found.items():
        assert_relaxed(tensor, family, name)


def test_a_published_revision_that_is_not_there(family: Path, cache: Path, tmp_path: Path) -> None:
    publish(family / "stats", "someone/stats", cache)
    absent = config(family, parameters={"activation_stats": f"someone/stats@{'f' * 40}"})
    line = refused(yaml.safe_dump(absent), tmp_path)
    assert f"someone/stats@{'f' * 40}" in line


def test_measure_a_published_model(
    family: Path, cache: Path, token_file: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    publish(family / "base", "someone/base", cache)
    result = calibrate(
        CalibrationOptions(
            model="someone/base@main", out=str(tmp_path / "stats"), dataset=str(token_file)
        )
    )
    assert result.metadata.model.reference == "someone/base@main"
    assert result.metadata.model.revision == COMMIT
    again = (tmp_path / "stats" / "model.safetensors").read_bytes()
    assert again == (family / "stats" / "model.safetensors").read_bytes()
