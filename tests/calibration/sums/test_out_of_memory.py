"""When memory runs out: smaller batches, and never a token counted twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import LlamaMLP

from mergekit_arm.calibration.calibrate import calibrate
from mergekit_arm.errors import Failure
from tests.support.calibrations import WAYS, Killed, files, kill_at, options, undisturbed
from tests.support.equality import assert_same_statistics


@pytest.fixture(scope="module")
def whole(family: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return undisturbed(family, token_file, tmp_path_factory.mktemp("whole"))


def cramped(plain: Callable[..., Any], fits: int, error: Exception) -> Callable[..., Any]:
    """Return a forward that runs out of memory with more than ``fits`` sequences."""

    def forward(self: nn.Module, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if x.shape[0] > fits:
            raise error
        return plain(self, x, *rest, **named)

    return forward


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to …"),
    MemoryError(),
]


@pytest.mark.parametrize(
    ("error", "low_memory"),
    [*((error, False) for error in OUT_OF_MEMORY), (OUT_OF_MEMORY[0], True)],
    ids=["gpu", "cpu", "python", "low-memory"],
)
def test_out_of_memory_halves_the_batch(
    error: Exception,
    low_memory: bool,
    family: Path,
    token_file: Path,
    tmp_path: Path,
    whole: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It fails in the second half of a layer: what the first half added must not be added twice."""
    settings: dict[str, Any] = {"batch_size": 8, "low_memory": low_memory}
    notes: list[str] = []
    monkeypatch.setattr(LlamaMLP, "forward", cramped(LlamaMLP.forward, 3, error))
    calibrate(options(family, tmp_path / "s", token_file, **settings), say=notes.append)
    assert_same_statistics(tmp_path / "s", whole[low_memory], rtol=1e-6)
    (note,) = (note for note in notes if "Out of memory" in note)
    assert "with 8 sequences at once" in note
    assert "--batch-size 4" in note


@pytest.mark.parametrize("low_memory", WAYS)
def test_out_of_memory_with_one_sequence(
    low_memory: bool,
    family: Path,
    token_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = torch.OutOfMemoryError("out of memory")
    # The leader's few tokens pass, as on a real machine.
    plain = LlamaMLP.forward

    def forward(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 16:
            raise error
        return plain(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(Failure, match=r"single sequence of 32 tokens: use .*--sequence-length"):
        calibrate(options(family, tmp_path / "s", token_file, low_memory=low_memory))


def test_a_run_that_halved_its_batches_resumes(
    family: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(LlamaMLP, "forward", cramped(LlamaMLP.forward, 2, error))
    settings: dict[str, Any] = {"batch_size": 5, "low_memory": True}
    calibrate(options(family, tmp_path / "whole", token_file, **settings))
    with pytest.raises(Killed):
        calibrate(options(family, tmp_path / "s", token_file, **settings), kill_at(9))
    calibrate(options(family, tmp_path / "s", token_file, **settings))
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_other_errors_are_not_taken_for_lack_of_memory(
    family: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: LlamaModel, *_: Any, **__: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(LlamaModel, "forward", forward)
    with pytest.raises(RuntimeError, match="shapes"):
        calibrate(options(family, tmp_path / "s", token_file))
