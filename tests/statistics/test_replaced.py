"""A directory that changes while it is open: never a mixture of two measurements."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mergekit_arm.errors import InputError
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.read import Statistics, open_statistics

WEIGHT = "model.layers.0.mlp.down_proj.weight"


def read(statistics: Statistics) -> float:
    record = statistics.metadata.weights[WEIGHT]
    return float(IMPORTANCE.values(statistics, record, "mean_abs").sum())


@pytest.fixture
def other(family: Path, tmp_path: Path, measure: object, token_file: Path) -> Path:
    """Statistics of another model, whose files have the same names and sizes."""
    assert callable(measure)
    folder: Path = measure(family / "a", tmp_path / "other")
    return folder


def test_tensors_that_are_replaced_beside_an_old_json(family: Path, tmp_path: Path) -> None:
    stats = shutil.copytree(family / "stats", tmp_path / "s")
    opened = open_statistics(str(stats))
    tensors = load_file(stats / "model.safetensors")
    doubled = {name: 2 * x if name.endswith("abs_sum") else x for name, x in tensors.items()}
    save_file(doubled, tmp_path / "new")
    (tmp_path / "new").replace(stats / "model.safetensors")
    with pytest.raises(InputError, match=r"s: files in .* have changed since they were opened"):
        read(opened)
    assert open_statistics(str(stats)) is not opened


def test_a_directory_that_is_replaced(family: Path, other: Path, tmp_path: Path) -> None:
    stats = shutil.copytree(family / "stats", tmp_path / "s")
    opened = open_statistics(str(stats))
    shutil.rmtree(stats)
    with pytest.raises(InputError):
        read(opened)
    other.rename(stats)
    with pytest.raises(InputError, match="have changed since"):
        read(opened)
    assert read(open_statistics(str(stats))) != read(Statistics("base", family / "stats"))


def test_a_link_that_turns(family: Path, other: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(family / "stats")
    opened = open_statistics(str(link))
    first = read(opened)
    link.unlink()
    link.symlink_to(other)
    turned = open_statistics(str(link))
    assert turned is not opened
    assert read(turned) != first
    # What was opened goes on reading the directory that it was opened on.
    assert read(opened) == first
