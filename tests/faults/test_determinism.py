"""The same inputs give the same bytes; with other numbers of threads, numbers that are as close.

torch promises the same order of adding up for one number of threads only. What is elementwise, as a
merge's relaxation, depends on no order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.scripts.run_yaml import main as mergekit_yaml

from tests.support.calibrations import files
from tests.support.merges import config, run
from tests.support.stored import Folder

THREADS = (1, 2, 4)
CLOSE = 1e-5
"""Relative: forward passes are in float32, whose rounding is 6e-8, through some sums of dozens."""


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("low_memory", [False, True])
def test_statistics(
    low_memory: bool, family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    found = []
    for threads in (*THREADS, THREADS[0]):
        torch.set_num_threads(threads)
        out = tmp_path / str(len(found))
        found.append(measure(family / "base", out, low_memory=low_memory, batch_size=2))
    assert files(found[-1]) == files(found[0])
    first = Folder.open(found[0])
    sums = [name for name in first.tensors if name.endswith(("abs_sum", "square_sum"))]
    assert len(sums) > 20
    for other in map(Folder.open, found[1:]):
        assert other.metadata["sites"].keys() == first.metadata["sites"].keys()
        for name in sums:
            torch.testing.assert_close(
                other.tensors[name], first.tensors[name], rtol=CLOSE, atol=0, msg=name
            )


@pytest.mark.parametrize("method", ["aim", "aim_ties"])
def test_merges(method: str, family: Path, tmp_path: Path) -> None:
    bytes_of = set()
    for number, threads in enumerate((*THREADS, THREADS[0])):
        torch.set_num_threads(threads)
        document = yaml.safe_dump(config(family, merge_method=method))
        out = run(mergekit_yaml, document, tmp_path / str(number), "--no-write-model-card")
        bytes_of.add(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
    assert len(bytes_of) == 1
