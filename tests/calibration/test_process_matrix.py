"""Every number of processes with every number of batches: none of them may wait for ever."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.support.equality import assert_same_statistics
from tests.support.models import VOCABULARY, tiny_llama
from tests.support.ranks import Death, run_jobs, run_ranks

PROCESSES = (2, 4)
BLOCKS = (1, 3, 6)
BATCH_SIZES = (1, 2)
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


CASES = [
    Case(*settings) for settings in itertools.product(PROCESSES, BLOCKS, BATCH_SIZES, (False, True))
]


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


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_dry_run_ends_on_a_process_without_a_batch(
    low_memory: bool, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    case = Case(3, 1, 1, low_memory)
    ended = run_ranks([command(case, tmp_path / "s", "--dry-run")] * case.processes, tmp_path)
    assert [rank.status for rank in ended] == [0, 0, 0], ended
    assert [rank.said for rank in ended[1:]] == ["", ""]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_process_without_a_batch_resumes_with_the_others(
    low_memory: bool, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    case = Case(3, 3, 2, low_memory)
    assert case.batches() == [1, 1, 0]
    one = [command(case, tmp_path / "one")]
    assert run_ranks([one[0]], tmp_path)[0].status == 0
    job = [command(case, tmp_path / "s", "--save-every", "0")] * case.processes
    first = run_ranks(job, tmp_path, Death(process=1, batch=STAGES if low_memory else 1))
    assert [rank.status for rank in first] == [1, -9, 1], first
    again = run_ranks(job, tmp_path)
    assert [rank.status for rank in again] == [0, 0, 0], again
    assert_same_statistics(tmp_path / "s", tmp_path / "one", rtol=1e-6)
    assert not (tmp_path / "s.partial").exists()
