"""Processes with fewer batches than others, or none: nobody may wait for ever."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.support.equality import assert_same_statistics
from tests.support.models import VOCABULARY, tiny_llama
from tests.support.ranks import Death, run_jobs, run_ranks

BLOCKS = (1, 3, 6)
LAYERS = 1
STAGES = LAYERS + 1
"""What batches pass one after the other with ``--low-memory``: the layers, and what is behind."""


@dataclass(frozen=True)
class Case:
    processes: int
    blocks: int
    batch_size: int
    low_memory: bool

    def batches(self) -> list[int]:
        """How many each process has: a single block first, then full batches, in turn."""
        found, left = [1], self.blocks - 1
        while left > 0:
            found.append(min(self.batch_size, left))
            left -= found[-1]
        return [len(found[process :: self.processes]) for process in range(self.processes)]


SHAPES = ((2, 1, 1), (2, 3, 1), (2, 6, 1), (3, 3, 2), (3, 6, 2), (4, 1, 1))
CASES = [Case(*shape, low_memory) for shape in SHAPES for low_memory in (False, True)]
WITHOUT = [Case(3, 3, 2, low_memory) for low_memory in (False, True)]
"""The last process has no batch."""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Return a function that writes the command of a case."""
    folder = tmp_path_factory.mktemp("matrix")
    tiny_llama(0, layers=LAYERS).save_pretrained(folder / "model")
    ids = torch.randint(VOCABULARY, (max(BLOCKS), 16), generator=torch.Generator().manual_seed(3))
    for blocks in BLOCKS:
        rows = [json.dumps({"input_ids": row}) for row in ids[:blocks].tolist()]
        (folder / f"{blocks}.jsonl").write_text("\n".join(rows) + "\n")

    def write(case: Case, out: Path, *more: str) -> list[str]:
        arguments = ["calibrate", str(folder / "model"), str(out), "--device", "cpu"]
        arguments += ["--dataset", str(folder / f"{case.blocks}.jsonl")]
        arguments += ["--batch-size", str(case.batch_size), *more]
        return [*arguments, "--low-memory"] if case.low_memory else arguments

    return write


def test_the_cases_give_a_process_from_none_to_three_batches() -> None:
    assert {number for case in CASES for number in case.batches()} == {0, 1, 2, 3}


def test_all_processes_end_and_measure_what_one_does(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    alone = {case.blocks: case for case in CASES if case.batch_size == 1 and not case.low_memory}
    jobs = [[command(case, tmp_path / f"alone-{blocks}")] for blocks, case in alone.items()]
    for number, case in enumerate(CASES):
        jobs.append([command(case, tmp_path / str(number))] * case.processes)
    ended = run_jobs(jobs, tmp_path)[len(alone) :]
    for number, (case, ranks) in enumerate(zip(CASES, ended, strict=True)):
        assert [rank.status for rank in ranks] == [0] * case.processes, (case, ranks)
        stages = STAGES if case.low_memory else 1
        assert [rank.batches for rank in ranks] == [n * stages for n in case.batches()], case
        assert_same_statistics(tmp_path / str(number), tmp_path / f"alone-{case.blocks}", rtol=1e-6)


def test_a_dry_run_ends_on_a_process_without_a_batch(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    jobs = [[command(case, tmp_path / "s", "--dry-run")] * case.processes for case in WITHOUT]
    for ended in run_jobs(jobs, tmp_path):
        assert [rank.status for rank in ended] == [0, 0, 0], ended
        assert [rank.said for rank in ended[1:]] == ["", ""]
    assert list(tmp_path.iterdir()) == []


def test_a_process_without_a_batch_resumes_with_the_others(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    jobs = []
    for case in WITHOUT:
        assert case.batches() == [1, 1, 0]
        out = tmp_path / f"low-memory-{case.low_memory}"
        jobs.append([command(case, out, "--save-every", "0")] * case.processes)
        death = Death(process=1, batch=STAGES if case.low_memory else 1)
        first = run_ranks(jobs[-1], tmp_path, death)
        assert [rank.status for rank in first] == [1, -9, 1], first
    jobs.append([command(WITHOUT[0], tmp_path / "one")])
    for ended in run_jobs(jobs, tmp_path):
        assert {rank.status for rank in ended} == {0}, ended
    for case in WITHOUT:
        out = tmp_path / f"low-memory-{case.low_memory}"
        assert_same_statistics(out, tmp_path / "one", rtol=1e-6)
        assert not out.with_name(f"{out.name}.partial").exists()
