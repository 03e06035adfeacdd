"""Statistics of a running model: measured, or carried over from an earlier one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from mergekit_arm.errors import InputError
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.kinds.subspace import SUBSPACE
from mergekit_arm.statistics.locate import read_metadata
from mergekit_arm.statistics.read import open_statistics
from mergekit_arm.streaming.calibration import Calibration
from mergekit_arm.streaming.step.measuring import carry_over, measure_model
from tests.support.models import perturbed, tiny_llama
from tests.support.streams import write_tokens


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, a later model ``next`` of the same run, and the base's ``statistics``."""
    folder = tmp_path_factory.mktemp("scene")
    base = tiny_llama(0)
    base.save_pretrained(folder / "base")
    perturbed(base, 1).save_pretrained(folder / "next")
    settings = Calibration.model_validate({"dataset": str(write_tokens(folder / "t.jsonl", 3))})
    measure_model(
        str(folder / "base"),
        folder / "statistics",
        1,
        settings.settings,
        ("importance", "subspace"),
        MergeOptions(),
        say=print,
    )
    return folder


def test_carried_over_statistics_belong_to_the_later_model(scene: Path, tmp_path: Path) -> None:
    carried = carry_over(scene / "statistics", 1, scene / "next", tmp_path / "carried")
    assert (carried.measured_at, carried.tokens) == (1, 192)
    statistics = open_statistics(str(carried.path))
    base, later = (load_file(scene / m / "model.safetensors") for m in ("base", "next"))
    for name, weight in later.items():
        found, record = statistics.matcher.find(name, weight)
        assert found == name
        with pytest.raises(InputError, match="values differ"):
            statistics.matcher.find(name, base[name])
        if record.site and weight.ndim == 2:
            old = open_statistics(str(scene / "statistics"))
            original = old.metadata.weights[name]
            importance = [
                IMPORTANCE.values(one, entry, "rms")
                for one, entry in ((statistics, record), (old, original))
            ]
            assert torch.equal(*importance)
            bases = [
                SUBSPACE.basis(one, entry, 0.9)
                for one, entry in ((statistics, record), (old, original))
            ]
            # The head's input is measured, but not its subspace.
            assert (bases[0] is None) == (bases[1] is None) == (name == "lm_head.weight")
            if bases[0] is not None:
                assert torch.equal(*bases)


def test_a_model_with_other_weights_cannot_take_them_over(scene: Path, tmp_path: Path) -> None:
    tiny_llama(0, layers=3).save_pretrained(tmp_path / "deeper")
    with pytest.raises(InputError, match=r"model.layers.2.*refresh: every"):
        carry_over(scene / "statistics", 1, tmp_path / "deeper", tmp_path / "carried")
    assert not (tmp_path / "carried").exists()


def test_what_was_measured_is_not_measured_again(scene: Path) -> None:
    before = read_metadata("scene", scene / "statistics")
    again = measure_model(
        "no such model", scene / "statistics", 1, {}, ("importance",), MergeOptions(), say=print
    )
    assert again.tokens == before.data.tokens


def test_subspaces_alone_can_be_read(scene: Path, tmp_path: Path) -> None:
    settings = Calibration.model_validate({"dataset": str(scene / "t.jsonl")})
    measure_model(
        str(scene / "base"),
        tmp_path / "alone",
        1,
        settings.settings,
        ("subspace",),
        MergeOptions(),
        say=print,
    )
    statistics = open_statistics(str(tmp_path / "alone"))
    record = statistics.metadata.weights["model.layers.1.mlp.down_proj.weight"]
    basis = SUBSPACE.basis(statistics, record, 0.9)
    assert basis is not None
    assert basis.shape[0] == 48
