"""Many processes: the same result as one, and a death that is named instead of a hang."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from tests.architectures.zoo import ZOO, build
from tests.support.calibrations import WAYS, undisturbed
from tests.support.equality import assert_same_statistics
from tests.support.models import VOCABULARY
from tests.support.ranks import LIMIT, Death, Ended, run_ranks

TOLERANCE = 1e-6
HERE = socket.gethostname()


@pytest.fixture(scope="module")
def whole(family: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What one process measures, for each of ``WAYS``."""
    return undisturbed(family, token_file, tmp_path_factory.mktemp("whole"))


def calibrate(model: Path, out: Path, dataset: Path, *more: str) -> list[str]:
    arguments = ["calibrate", str(model), str(out), "--dataset", str(dataset)]
    return [*arguments, "--device", "cpu", "--batch-size", "2", "--save-every", "0", *more]


def run(
    processes: int, command: list[str], folder: Path, death: Death | None = None
) -> list[Ended]:
    return run_ranks([command] * processes, folder, death)


def low_memory_flag(low_memory: bool) -> list[str]:
    return ["--low-memory"] if low_memory else []


@pytest.mark.parametrize("low_memory", WAYS)
def test_three_processes_measure_what_one_does(
    low_memory: bool, family: Path, token_file: Path, tmp_path: Path, whole: list[Path]
) -> None:
    command = calibrate(family / "base", tmp_path / "s", token_file, *low_memory_flag(low_memory))
    ended = run(3, command, tmp_path)
    assert [one.status for one in ended] == [0, 0, 0], ended
    stages = 3 if low_memory else 1
    assert [one.batches for one in ended] == [3 * stages, 2 * stages, 2 * stages]
    assert_same_statistics(tmp_path / "s", whole[low_memory], rtol=TOLERANCE)
    assert "tokens will take" in ended[0].output
    # Written once, and told once.
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert ended[1].output.strip("BATCH ") == ended[2].output.strip("BATCH ") == ""


def test_processes_fall_back_together_where_a_model_cannot_be_walked(
    token_file: Path, tmp_path: Path
) -> None:
    (model,) = (build(one) for one in ZOO if one.file == "t5")
    model.save_pretrained(tmp_path / "model")
    in_memory = calibrate(tmp_path / "model", tmp_path / "whole", token_file)
    assert run(1, in_memory, tmp_path)[0].status == 0
    walked = calibrate(tmp_path / "model", tmp_path / "s", token_file, "--low-memory")
    ended = run(2, walked, tmp_path)
    assert [one.status for one in ended] == [0, 0], ended
    assert ended[0].output.count("cannot be walked layer by layer") == 1
    assert "walked" not in ended[1].output
    assert_same_statistics(tmp_path / "s", tmp_path / "whole", rtol=TOLERANCE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "s", "whole"]


@pytest.mark.parametrize("low_memory", WAYS)
def test_a_process_that_is_killed_is_named_and_the_job_resumes(
    low_memory: bool, family: Path, token_file: Path, tmp_path: Path, whole: list[Path]
) -> None:
    command = calibrate(family / "base", tmp_path / "s", token_file, *low_memory_flag(low_memory))
    begun = time.monotonic()
    survivor, killed = run(2, command, tmp_path, Death(process=1, batch=2))
    assert time.monotonic() - begun < 60
    assert (survivor.status, killed.status) == (1, -9)
    assert f"rank 1 on {HERE} died: no sign of life" in survivor.output
    assert "the same command continues" in survivor.output
    assert "Traceback" not in survivor.output
    assert not (tmp_path / "s").exists()
    first, second = run(2, command, tmp_path)
    assert (first.status, second.status) == (0, 0)
    # The survivor had got through its four batches, and saved them.
    stages = 3 if low_memory else 1
    assert first.batches == 4 * (stages - 1)
    assert second.batches == 3 * stages - 1
    assert_same_statistics(tmp_path / "s", whole[low_memory], rtol=TOLERANCE)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_the_first_process_is_killed(family: Path, token_file: Path, tmp_path: Path) -> None:
    """With it goes what the others would hear of a death by."""
    command = calibrate(family / "base", tmp_path / "s", token_file)
    saved = [tmp_path / "s.partial" / f"process-{n}.sums.safetensors" for n in range(2)]
    death = Death(process=0, batch=3, after=saved[1])
    killed, survivor = run(2, command, tmp_path, death)
    assert (killed.status, survivor.status) == (-9, 1)
    assert "rank 0 on 127.0.0.1" in survivor.output
    assert "died" in survivor.output
    assert "the same command continues" in survivor.output
    assert all(path.exists() for path in saved)


@pytest.mark.parametrize("process", [0, 1])
def test_an_error_in_one_process_ends_the_others(
    process: int, family: Path, token_file: Path, tmp_path: Path
) -> None:
    command = calibrate(family / "base", tmp_path / "s", token_file)
    ended = run(3, command, tmp_path, Death(process, batch=2, kill=False))
    assert [one.status for one in ended] == [1, 1, 1]
    name = f"rank {process} on {HERE}"
    for number, one in enumerate(ended):
        said = f"{name}: " if number == process else f"{name} failed: "
        assert f"{said}RuntimeError: a broken cable" in one.output
        assert "Traceback" not in one.output
    assert (tmp_path / "s.partial").is_dir()


def test_wrong_input_is_said_once(family: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "words.jsonl"
    dataset.write_text('{"input_ids": [1, 999]}\n')
    ended = run(3, calibrate(family / "base", tmp_path / "s", dataset), tmp_path)
    assert [one.status for one in ended] == [2, 2, 2]
    assert "made with another tokenizer" in ended[0].output
    assert [one.said for one in ended[1:]] == ["", ""]
    assert "Traceback" not in ended[0].output


def test_processes_that_were_told_different_things(
    family: Path, token_file: Path, tmp_path: Path
) -> None:
    commands = [
        calibrate(family / "base", tmp_path / "s", token_file, "--rank", rank) for rank in "87"
    ]
    first, second = run_ranks(commands, tmp_path)
    assert (first.status, second.status) == (2, 2)
    assert "rank of rank 1 is 7, but that of rank 0 is 8" in first.output
    assert second.said == ""
    assert list(tmp_path.iterdir()) == []


@contextmanager
def torchrun(processes: int, command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a job on this host; nothing of it outlives the block."""
    launcher = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), "-m", "mergekit_arm", *command),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield launcher
    finally:
        started = psutil.Process(launcher.pid).children() if launcher.poll() is None else []
        for process in [launcher, *started]:
            process.kill()
        launcher.wait()


def finish(launcher: subprocess.Popen[str]) -> str:
    """Wait for the end; return what was said, on one line."""
    output, _ = launcher.communicate(timeout=LIMIT)
    return re.sub(r"\s+", " ", output)


@pytest.mark.slow
def test_torchrun_low_memory(
    family: Path, token_file: Path, tmp_path: Path, whole: list[Path]
) -> None:
    command = calibrate(family / "base", tmp_path / "s", token_file, "--low-memory")
    with torchrun(2, command) as launcher:
        output = finish(launcher)
    assert launcher.returncode == 0, output
    assert output.count("tokens will take") == 1
    assert_same_statistics(tmp_path / "s", whole[True], rtol=TOLERANCE)


@pytest.mark.long
def test_torchrun_refuses_wrong_input_once(family: Path, tmp_path: Path) -> None:
    command = calibrate(family / "base", tmp_path / "s", tmp_path / "nothing.jsonl")
    with torchrun(2, command) as launcher:
        output = finish(launcher)
    assert launcher.returncode != 0
    assert output.count("nothing.jsonl") == 1
    assert re.search(r"exitcode : 2\b", output)
    assert output.count("Traceback (most recent call last)") <= 1  # the launcher's own
    assert "mergekit_arm/" not in output


@pytest.fixture
def long_file(tmp_path: Path) -> Path:
    """Rows enough for a process to be found and killed before it is through."""
    path = tmp_path / "long.jsonl"
    ids = torch.randint(VOCABULARY, (300, 32), generator=torch.Generator().manual_seed(7))
    path.write_text("".join(f'{{"input_ids": {row}}}\n' for row in ids.tolist()))
    return path


@pytest.mark.slow
def test_torchrun_with_a_process_that_is_killed(
    family: Path, long_file: Path, tmp_path: Path
) -> None:
    command = calibrate(family / "base", tmp_path / "s", long_file, "--samples", "300")
    with torchrun(2, command) as launcher:
        saved = [tmp_path / "s.partial" / f"process-{n}.sums.safetensors" for n in range(2)]
        until = time.monotonic() + LIMIT
        while not all(path.exists() for path in saved):
            assert time.monotonic() < until
            assert launcher.poll() is None
            time.sleep(0.05)
        workers = psutil.Process(launcher.pid).children()
        (victim,) = (worker for worker in workers if worker.environ().get("RANK") == "1")
        victim.kill()
        begun = time.monotonic()
        output = finish(launcher)
    assert time.monotonic() - begun < 30
    assert launcher.returncode != 0
    assert "rank : 1 (local_rank: 1)" in output
    assert "the same command continues" in output
    assert all(path.exists() for path in saved)
    assert not (tmp_path / "s").exists()

    assert [one.status for one in run(2, command, tmp_path)] == [0, 0]
    command = calibrate(family / "base", tmp_path / "one", long_file, "--samples=300")
    (alone,) = run(1, [*command, "--save-every=1h"], tmp_path)
    assert alone.status == 0
    assert_same_statistics(tmp_path / "s", tmp_path / "one", rtol=TOLERANCE)
    assert not (tmp_path / "s.partial").exists()
