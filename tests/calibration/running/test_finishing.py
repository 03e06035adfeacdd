"""What comes after the last token: eigenvectors, with progress of their own, and writing."""

from __future__ import annotations

import errno
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_arm.calibration import calibrate as calibrate_module
from mergekit_arm.calibration.calibrate import calibrate
from mergekit_arm.calibration.running import finishing
from mergekit_arm.calibration.running.preflight import Preflight
from mergekit_arm.errors import Failure, InputError
from mergekit_arm.statistics.kinds.subspace import SubspaceSketch
from tests.support.calibrations import WAYS, Killed, files, kill_at, options, undisturbed

INPUTS = 2 * 6 + 2
"""Of the tiny Llama: four that matrices read and two of norms a layer, the last norm and head."""


@pytest.fixture(scope="module")
def whole(family: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return undisturbed(family, token_file, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grow by one whenever eigenvectors are made."""
    made: list[int] = []
    plain = SubspaceSketch.finish

    def finish(self: SubspaceSketch) -> dict[str, torch.Tensor]:
        made.append(len(made))
        return plain(self)

    monkeypatch.setattr(SubspaceSketch, "finish", finish)
    return made


def at_input(number: int, act: Callable[[], None]) -> Callable[[str, int, int], None]:
    """Return a report that acts when ``number`` more inputs of the run have been finished."""
    count = itertools.count()

    def report(_name: str, done: int, total: int) -> None:
        if total and done and next(count) == number:
            act()

    return report


def killed() -> None:
    raise Killed


def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the estimate out, which makes eigenvectors, too."""
    monkeypatch.setattr(finishing, "trial_seconds", lambda *_: 0.0)


@pytest.mark.parametrize("low_memory", WAYS)
@pytest.mark.parametrize("number", [0, 4])
def test_killed_while_finishing_it_continues_there(
    low_memory: bool,
    number: int,
    family: Path,
    token_file: Path,
    tmp_path: Path,
    whole: list[Path],
    finished: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_trial(monkeypatch)
    given = options(family, tmp_path / "s", token_file, low_memory=low_memory)
    with pytest.raises(Killed):
        calibrate(given, stage=at_input(number, killed))
    done: list[int] = []
    finished.clear()
    calibrate(given, lambda tokens, total: done.append(tokens))
    if not low_memory:
        assert done == []  # no token is measured again
        # What was kept is not finished again: eight inputs have eigenvectors.
        assert len(finished) == 8 if number == 0 else 0 < len(finished) < 8
    assert files(tmp_path / "s") == files(whole[low_memory])
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("low_memory", WAYS)
def test_a_signal_while_finishing_keeps_what_is_finished(
    low_memory: bool,
    number: signal.Signals,
    family: Path,
    token_file: Path,
    tmp_path: Path,
    whole: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = options(family, tmp_path / "s", token_file, low_memory=low_memory, save_every="1h")
    stop = at_input(5, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Failure, match=rf"stopped by {number.name}; progress is in .*s\.partial"):
        calibrate(given, stage=stop)
    assert list((tmp_path / "s.partial").glob("*pieces*"))
    seen: list[tuple[int, int]] = []
    calibrate(given, stage=lambda _name, done, total: seen.append((done, total)))
    counts = [pair for pair in seen if pair[1]]
    assert counts[0][0] > 0  # it does not begin at none
    assert counts[-1][0] == counts[-1][1]
    assert files(tmp_path / "s") == files(whole[low_memory])


def test_how_many_are_finished_at_once_changes_no_byte(
    family: Path,
    token_file: Path,
    tmp_path: Path,
    whole: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, asked = torch.get_num_threads(), []
    plain = finishing.add_up

    def add_up(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        return plain(*arguments[:-1], 5)

    monkeypatch.setattr(finishing, "add_up", add_up)
    calibrate(options(family, tmp_path / "s", token_file))
    assert asked == [threads]
    assert torch.get_num_threads() == threads
    assert files(tmp_path / "s") == files(whole[False])


def test_as_many_at_once_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(finishing, "free_memory", lambda device: 0)
    assert finishing.at_once([], torch.device("cpu")) == 1
    monkeypatch.setattr(finishing, "free_memory", lambda device: 10**12)
    assert finishing.at_once([], torch.device("cpu")) == 64
    assert finishing.at_once([], torch.device("cuda")) == 1


@pytest.mark.parametrize("low_memory", WAYS)
def test_the_estimate_has_the_eigenvectors_in_it(
    low_memory: bool,
    family: Path,
    token_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        finishing, "trial_seconds", lambda kind, *_: 10.0 * (kind.name == "subspace")
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found: list[Preflight] = []
    given = options(family, tmp_path / "s", token_file, low_memory=low_memory, dry_run=True)
    calibrate(given, preflight=found.append)
    assert found[0].finishing == 2 * 4 * 10 / 2  # layers, inputs of matrices, threads
    assert found[0].inputs == (12 if low_memory else INPUTS)  # a walk knows its layers' only
    assert f"finishing {found[0].inputs} inputs about 40 s" in found[0].lines()[0]


def test_a_trial_takes_as_long_as_a_site(
    family: Path, token_file: Path, tmp_path: Path, finished: list[int]
) -> None:
    found: list[Preflight] = []
    given = options(family, tmp_path / "s", token_file, dry_run=True)
    calibrate(given, preflight=found.append)
    assert found[0].finishing > 0
    assert len(finished) == 2  # one for each width
    calibrate(
        options(family, tmp_path / "s", token_file, dry_run=True, statistics=("importance",)),
        preflight=found.append,
    )
    assert found[1].finishing == 0
    assert "finishing" not in found[1].lines()[0]


@pytest.mark.parametrize("low_memory", WAYS)
def test_a_disk_that_is_full_at_the_end_costs_no_measurement(
    low_memory: bool,
    family: Path,
    token_file: Path,
    tmp_path: Path,
    whole: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = options(family, tmp_path / "s", token_file, low_memory=low_memory, save_every="1h")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(calibrate_module, "write_statistics", full)
        with pytest.raises(Failure, match=r"No space left on device; progress is in .*s\.partial"):
            calibrate(given)
    calibrate(given, kill_at(1))  # not a single batch
    assert files(tmp_path / "s") == files(whole[low_memory])
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_destination_that_cannot_be_written_is_refused_before_the_model_is_read(
    family: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "s", Path("/proc/nowhere/s"), tmp_path / ("n" * 300) / "s"):
        # Were a model looked for, that would be what is refused.
        given = options(family, out, token_file, model=str(tmp_path / "no-model"))
        with pytest.raises(InputError, match=r"cannot be written .*another OUT") as error:
            calibrate(given)
        assert "\n" not in error.value.message
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "mounted")
    (tmp_path / "mounted").mkdir()
    with pytest.raises(InputError, match=r"a disk is mounted at .*mounted/statistics"):
        calibrate(options(family, tmp_path / "mounted", token_file))


def test_trying_leaves_nothing_behind(family: Path, token_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folders" / "s"
    with pytest.raises(InputError, match="no such directory"):
        calibrate(options(family, out, token_file, model=str(tmp_path / "no-model")))
    assert list(tmp_path.iterdir()) == []


def test_a_kind_that_does_not_exist_is_refused_before_the_model_is_read(
    family: Path, token_file: Path, tmp_path: Path
) -> None:
    given = options(family, tmp_path / "s", token_file, statistics=("importence",), model="no/m/o")
    with pytest.raises(InputError, match="no kind of statistic named 'importence'"):
        calibrate(given)
