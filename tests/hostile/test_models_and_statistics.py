"""Whatever is wrong with what a user brings: one line with a remedy, and nothing half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.hostile.models_and_statistics import (
    MERGED,
    MERGEKIT,
    MODELS,
    SITE,
    STATISTICS,
    Break,
    Case,
)
from tests.hostile.refusals import assert_refused
from tests.hostile.scene import Scene, set_up


@pytest.fixture(scope="module")
def models(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's models in three shards each."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("base", "a"):
        model = LlamaForCausalLM.from_pretrained(family / name)
        model.save_pretrained(folder / name, max_shard_size="40KB")
    assert len(list((folder / "base").glob("*.safetensors"))) == 3
    return folder


@pytest.fixture
def scene(
    family: Path,
    models: Path,
    token_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Scene:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return set_up(tmp_path, family, token_file, models)


def table(*cases: list[Case]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    every = [case for part in cases for case in part]
    names = [name for name, _, _ in every]
    assert len(set(names)) == len(names)
    return pytest.mark.parametrize(("damage", "said"), [case[1:] for case in every], ids=names)


@table(STATISTICS)
def test_statistics(damage: Break, said: tuple[str, ...], scene: Scene) -> None:
    damage(scene)
    assert_refused(scene.merge(), said)
    if said[0] != f"{SITE}.abs_sum":  # rows that both have come first
        assert_refused(scene.combine(), said)


@table(MODELS)
def test_models_that_are_calibrated(damage: Break, said: tuple[str, ...], scene: Scene) -> None:
    damage(scene)
    assert_refused(scene.calibrate(), said)
    assert_refused(scene.calibrate("--low-memory"), said)


@table(MERGED)
def test_models_that_are_merged(damage: Break, said: tuple[str, ...], scene: Scene) -> None:
    damage(scene)
    for method in ("aim", "arm"):
        assert_refused(scene.merge(method=method), said)


@table(MERGEKIT)
def test_what_mergekit_meets_first(damage: Break, said: tuple[str, ...], scene: Scene) -> None:
    damage(scene)
    result = scene.merge()
    assert result.code != 0
    assert not [path for path in result.made if path.suffix == ".safetensors"]
    assert_refused(scene.calibrate(), said)


def test_what_is_whole_is_accepted(scene: Scene) -> None:
    """Otherwise the tables above would prove nothing."""
    merged = scene.merge()
    assert merged.code == 0, merged.output
    assert merged.made
