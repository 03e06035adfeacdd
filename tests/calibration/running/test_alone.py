"""One run at a time saves its progress beside an OUT."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_arm import outputs
from mergekit_arm.calibration import prepare
from mergekit_arm.calibration.calibrate import CalibrationOptions, calibrate
from mergekit_arm.calibration.running.progress import SavedProgress
from mergekit_arm.errors import InputError


def progress(folder: Path) -> SavedProgress:
    return SavedProgress(folder, {"model": "m"}, every=0)


def test_a_second_run_is_refused_also_after_progress_was_discarded(tmp_path: Path) -> None:
    """``--force`` discards the progress of another run while it holds the lock."""
    folder = tmp_path / "not" / "yet" / "out.partial"
    first = progress(folder)
    with first.alone():
        for _ in range(2):
            with pytest.raises(InputError, match="another calibration"), progress(folder).alone():
                pass
            first.discard()
    assert not list(tmp_path.iterdir())
    with progress(folder).alone():
        pass


TIMES = 100


def come_and_go(folder: Path, found: Any) -> None:
    """Take the lock and let go of it many times; say what is wrong, or nothing."""
    held = 0
    try:
        while held < TIMES:
            with contextlib.suppress(InputError), progress(folder).alone():
                inside = folder / "inside"
                inside.touch(exist_ok=False)  # nobody else is in here
                inside.unlink()
                held += 1
    except BaseException as error:
        found.put(repr(error))
        raise
    found.put("nothing")


def test_runs_that_begin_as_others_end(tmp_path: Path) -> None:
    """Each removes lock and directory when it ends, just as the others open them."""
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    folder = tmp_path / "out.partial"
    started = [context.Process(target=come_and_go, args=(folder, found)) for _ in range(3)]
    for one in started:
        one.start()
    assert [found.get(timeout=120) for _ in started] == ["nothing"] * 3
    for one in started:
        one.join()
    assert not list(tmp_path.iterdir())


def test_a_directory_that_others_remove_and_make_in_the_same_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock then fails where it wants to make the directory; the next try holds it."""
    failures, acquire = [FileExistsError(17, "File exists")], outputs.FileLock.acquire

    def fail_once(lock: Any, *given: Any) -> Any:
        if failures:
            raise failures.pop()
        return acquire(lock, *given)

    monkeypatch.setattr(outputs.FileLock, "acquire", fail_once)
    with progress(tmp_path / "out.partial").alone():
        assert not failures
        with pytest.raises(InputError, match="another"), progress(tmp_path / "out.partial").alone():
            pass


@pytest.mark.parametrize("below", ["", "below"])
def test_a_link_to_nothing_is_refused(tmp_path: Path, below: str) -> None:
    """No directory can be made there, however often it is tried."""
    (tmp_path / "link").symlink_to("nothing")
    with (
        pytest.raises(InputError, match="link is no directory; give another OUT"),
        progress(tmp_path / "link" / below).alone(),
    ):
        pass


def test_another_run_that_ended_meanwhile_is_noticed_before_anything_is_measured(
    family: Path, tmp_path: Path, measure: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    token_file: Path,
) -> None:  # fmt: skip
    out, load = tmp_path / "out", prepare.load_model

    def load_late(*given: Any) -> Any:
        monkeypatch.setattr(prepare, "load_model", load)
        measure(family / "base", out)
        return load(*given)

    monkeypatch.setattr(prepare, "load_model", load_late)
    options = CalibrationOptions(str(family / "base"), str(out), str(token_file))
    with pytest.raises(InputError, match="exists; add --force"):
        calibrate(options, lambda *_: pytest.fail("it was measured"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_corpus_is_never_printed(
    family: Path, tmp_path: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's ``signal`` makes text of the handlers it is given: of ours, it took minutes."""
    monkeypatch.setattr("torch.Tensor.__repr__", lambda _: pytest.fail("a tensor was printed"))
    calibrate(CalibrationOptions(str(family / "base"), str(tmp_path / "out"), str(token_file)))
