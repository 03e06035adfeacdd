"""mergekit's multi-GPU executor with our methods: threads, and a default device of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.merge_methods import merge_state_dicts
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_arm.statistics.probe import probe_positions
from tests.support.merges import config, run, weights

METHODS: dict[str, dict[str, Any]] = {
    "aim": {"omega": 0.3, "weight": 1.0},
    "aim_ties": {"omega": 0.3, "weight": 1.0, "density": 0.5, "importance": "rms"},
    "arm": {"rotation": -0.4, "learning_rate": 0.7},
    "regmean": {"weight": 0.7},
}


@pytest.fixture(scope="module")
def own(
    family: Path, tmp_path_factory: pytest.TempPathFactory, measure: Callable[..., Path]
) -> Path:
    """Statistics of the incoming model."""
    return measure(family / "a", tmp_path_factory.mktemp("own") / "a-stats")


def document(folder: Path, method: str, own: Path) -> str:
    parameters = {"activation_stats": str(folder / "stats"), **METHODS[method]}
    models = [{"model": str(folder / "a"), "parameters": {"activation_stats": str(own)}}]
    return yaml.safe_dump(config(folder, merge_method=method, models=models, parameters=parameters))


@pytest.mark.parametrize("method", METHODS)
def test_the_executor_for_several_gpus_gives_the_same(
    method: str, family: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processors stand in for GPUs; threads, islands of tasks and all else are mergekit's."""
    executor = "mergekit.multigpu_executor"
    monkeypatch.setattr(f"{executor}.get_torch_accelerator_type", lambda: "cpu")
    monkeypatch.setattr(f"{executor}.get_torch_accelerator_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.Stream", lambda device: None)
    monkeypatch.setattr("torch.cuda.stream", nullcontext)
    threads = run(mergekit_yaml, document(family, method, own), tmp_path / "many", "--multi-gpu")
    alone = weights(run(mergekit_yaml, document(family, method, own), tmp_path / "one"))
    found = weights(threads)
    assert set(found) == set(alone)
    assert all(torch.equal(found[name], tensor) for name, tensor in alone.items())


@pytest.mark.parametrize("method", METHODS)
def test_a_default_device_that_holds_none_of_the_tensors(
    method: str, family: Path, own: Path, tmp_path: Path
) -> None:
    """That executor makes each thread's GPU the default; statistics are read on the CPU."""
    states = {name: weights(family / name) for name in ("base", "a")}
    references = {"base": str(family / "stats"), "a": str(own)}
    shared = method not in ("arm", "regmean")
    parameters = {
        "activation_stats": references["base"] if shared else references,
        **METHODS[method],
    }

    def merge() -> dict[str, torch.Tensor]:
        merged: dict[str, torch.Tensor] = merge_state_dicts(
            states, method, base="base", parameters=parameters
        )
        return merged

    expected = merge()
    # As in a thread that is the first to look at statistics.
    shutil.copytree(family / "stats", tmp_path / "stats")
    shutil.copytree(own, tmp_path / "a-stats")
    references |= {"base": str(tmp_path / "stats"), "a": str(tmp_path / "a-stats")}
    parameters["activation_stats"] = references["base"] if shared else references
    probe_positions.cache_clear()
    with torch.device("meta"):
        found = merge()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
