"""Runs that were stopped, by kill -9 or by a signal, continue."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from mergekit_arm.calibration.calibrate import CalibrationOptions, calibrate
from mergekit_arm.calibration.running import progress as progress_module
from mergekit_arm.calibration.running.progress import SavedProgress
from mergekit_arm.errors import Failure, InputError
from tests.support.calibrations import WAYS, Killed, files, kill_at, options, undisturbed
from tests.support.forks import server


def die_at(given: CalibrationOptions, number: int) -> None:
    """Kill this process at the ``number``-th batch."""
    count = itertools.count(1)

    def report(_done: int, _total: int) -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    calibrate(given, report)


@pytest.fixture(scope="module")
def whole(family: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return undisturbed(family, token_file, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def interrupted(family: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run to ``s`` that ended at its third batch left there."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Killed):
        calibrate(options(family, folder / "s", token_file), kill_at(3))
    return folder


@pytest.mark.parametrize("low_memory", WAYS)
def test_after_kill_9_the_same_command_continues(
    low_memory: bool, family: Path, token_file: Path, tmp_path: Path, whole: list[Path]
) -> None:
    given = options(family, tmp_path / "s", token_file, low_memory=low_memory)
    for batches in (4, 3):
        process = server().Process(target=die_at, args=(given, batches))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "s").exists()
    calibrate(given)
    assert files(tmp_path / "s") == files(whole[low_memory])
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("low_memory", WAYS)
@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.long)])
def test_killed_at_random_moments(
    kills: int,
    low_memory: bool,
    family: Path,
    token_file: Path,
    tmp_path: Path,
    whole: list[Path],
) -> None:
    """Each of so many runs is killed once, somewhere in its life, and then ends."""
    generator = random.Random(3)
    begun = time.monotonic()
    for number in range(kills + 1):
        given = options(family, tmp_path / str(number) / "s", token_file, low_memory=low_memory)
        process = server().Process(target=calibrate, args=(given,))
        process.start()
        if number == 0:  # the first lives, and says how long a life is
            process.join()
            life = time.monotonic() - begun
            continue
        process.join(generator.uniform(0, life))
        process.kill()
        process.join()
        if not (tmp_path / str(number) / "s").exists():
            calibrate(given)
        assert files(tmp_path / str(number) / "s") == files(whole[low_memory])
        assert [path.name for path in (tmp_path / str(number)).iterdir()] == ["s"]


@pytest.mark.parametrize(
    ("low_memory", "numbers"), [(False, (1, 5)), (True, (1,)), (True, (9, 1, 3))]
)
def test_wherever_it_was_stopped(
    low_memory: bool,
    numbers: tuple[int, ...],
    family: Path,
    token_file: Path,
    tmp_path: Path,
    whole: list[Path],
) -> None:
    """Twelve rows make seven batches; a walk has two layers and what follows them."""
    given = options(family, tmp_path / "s", token_file, low_memory=low_memory)
    for number in numbers:
        with pytest.raises(Killed):
            calibrate(given, kill_at(number))
    calibrate(given)
    assert files(tmp_path / "s") == files(whole[low_memory])
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("low_memory", WAYS)
def test_only_the_last_interval_is_lost(
    low_memory: bool, family: Path, token_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        calibrate(options(family, tmp_path / "s", token_file, low_memory=low_memory), kill_at(4))
    done: list[int] = []
    calibrate(
        options(family, tmp_path / "s", token_file, low_memory=low_memory),
        lambda tokens, total: done.append(tokens),
    )
    layers = 2 if low_memory else 1  # each its share of every token
    assert done[0] == (1 + 2 + 2 + 2) * 32 // layers  # the fourth batch again, and none before it


def test_layers_that_are_done_have_sketches_or_have_none(
    family: Path, token_file: Path, tmp_path: Path
) -> None:
    """What is stored of a finished layer is all that is left of it."""
    with pytest.raises(Killed):
        calibrate(options(family, tmp_path / "s", token_file, low_memory=True), kill_at(6))
    kept = options(family, tmp_path / "s", token_file, low_memory=True, keep_sketch=True)
    with pytest.raises(InputError, match="keep sketch was off and is now on"):
        calibrate(kept)


def test_a_long_interval_saves_nothing_in_between(
    family: Path, token_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        calibrate(options(family, tmp_path / "s", token_file, save_every="1h"), kill_at(6))
    assert not (tmp_path / "s.partial").exists()


@pytest.mark.parametrize(
    ("number", "low_memory"),
    [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)],
)
def test_a_signal_saves_first(
    number: signal.Signals,
    low_memory: bool,
    family: Path,
    token_file: Path,
    tmp_path: Path,
    whole: list[Path],
) -> None:
    before = signal.getsignal(number)
    layers = 2 if low_memory else 1  # each its share of every token

    def report(done: int, _total: int) -> None:
        if done == 3 * 32 // layers:
            os.kill(os.getpid(), number)

    settings: dict[str, Any] = {"low_memory": low_memory, "save_every": "1h"}
    with pytest.raises(Failure, match=f"stopped by {number.name}; progress is in .*s.partial"):
        calibrate(options(family, tmp_path / "s", token_file, **settings), report)
    assert signal.getsignal(number) is before
    done: list[int] = []
    calibrate(
        options(family, tmp_path / "s", token_file, **settings),
        lambda tokens, total: done.append(tokens),
    )
    assert done[0] == 5 * 32 // layers
    assert files(tmp_path / "s") == files(whole[low_memory])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "a"}, "model was content"),
        ({"dataset": "other.jsonl"}, "data was 12 sequences, 384 tokens .* and is now 3 seq"),
        ({"samples": 8}, "data was 12 sequences, .* and is now 8 sequences"),
        ({"seed": 1}, "seed was 42 and is now 1|data was"),
        ({"dtype": "bfloat16"}, "dtype was float32 and is now bfloat16"),
        ({"statistics": ("importance",)}, "statistics was importance, subspace and is now imp"),
        ({"rank": 8}, "rank was None and is now 8"),
        ({"energy": 0.5}, "energy was .* and is now 0.5"),
        ({"skip_first": 1}, "skip first was 0 and is now 1"),
        ({"batch_size": 3}, "batch size was 2 and is now 3"),
        ({"low_memory": True}, "low memory was off and is now on"),
    ],
)
def test_progress_of_another_run_is_refused(
    changed: dict[str, Any],
    message: str,
    family: Path,
    token_file: Path,
    tmp_path: Path,
    interrupted: Path,
) -> None:
    if "model" in changed:
        changed = {"model": str(family / changed["model"])}
    dataset = token_file
    if "dataset" in changed:
        dataset = tmp_path / changed["dataset"]
        dataset.write_text("".join(token_file.read_text().splitlines(keepends=True)[:3]))
        changed = {}
    kept = files(interrupted / "s.partial")
    with pytest.raises(InputError, match=message) as error:
        calibrate(options(family, interrupted / "s", dataset, **changed))
    assert "s.partial" in error.value.message
    assert "--force" in error.value.message
    assert files(interrupted / "s.partial") == kept


def test_force_starts_over(
    family: Path, token_file: Path, tmp_path: Path, interrupted: Path
) -> None:
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    calibrate(options(family, tmp_path / "s", token_file, seed=1, force=True))
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_force_does_not_throw_away_its_own_progress(
    family: Path, token_file: Path, tmp_path: Path, interrupted: Path
) -> None:
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    shutil.copytree(family / "stats", tmp_path / "s")
    done: list[int] = []
    calibrate(
        options(family, tmp_path / "s", token_file, force=True),
        lambda tokens, total: done.append(tokens),
    )
    assert done[0] == 5 * 32


def test_damaged_progress_is_refused(
    family: Path, token_file: Path, tmp_path: Path, interrupted: Path
) -> None:
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    (file,) = (tmp_path / "s.partial").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        calibrate(options(family, tmp_path / "s", token_file))


def test_a_half_written_save_does_not_count(
    family: Path,
    token_file: Path,
    tmp_path: Path,
    whole: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed while saving: the save before is still there."""
    count = itertools.count(1)
    plain = progress_module.replacement

    @contextmanager
    def replacement(path: Path) -> Iterator[Path]:
        with plain(path) as unfinished:
            yield unfinished
            if next(count) == 4:
                unfinished.write_bytes(unfinished.read_bytes()[:100])
                # As a dead process would leave it.
                os.link(unfinished, unfinished.with_name(f"{unfinished.name}-dead"))
                raise Killed

    monkeypatch.setattr(progress_module, "replacement", replacement)
    with pytest.raises(Killed):
        calibrate(options(family, tmp_path / "s", token_file))
    monkeypatch.undo()
    done: list[int] = []
    calibrate(
        options(family, tmp_path / "s", token_file),
        lambda tokens, total: done.append(tokens),
    )
    assert done[0] == 7 * 32
    assert files(tmp_path / "s") == files(whole[False])


def test_a_model_that_gives_nan_leaves_no_progress(
    family: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = itertools.count(1)
    plain = LlamaMLP.forward

    def forward(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        return plain(self, x) * (float("nan") if next(count) > 8 else 1)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(Failure, match="NaN or infinity"):
        calibrate(options(family, tmp_path / "s", token_file))
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_be_the_one_to_remove_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = SavedProgress(tmp_path / "out.partial", {}, every=0)
    progress.save({}, [])

    def glob(folder: Path, _pattern: str) -> Iterator[Path]:
        shutil.rmtree(folder)
        yield from folder.iterdir()

    monkeypatch.setattr(Path, "glob", glob)
    progress.discard()
    assert list(tmp_path.iterdir()) == []
