"""Directories that long work goes on in: what they hold, and one process at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from pydantic import BaseModel

from mergekit_arm.errors import InputError
from mergekit_arm.outputs import alone, difference, holds, read_saved


def test_a_directory_made_for_a_lock_goes_with_it(tmp_path: Path) -> None:
    with alone(tmp_path / "a" / "b" / ".lock", "busy"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with alone(tmp_path / "a" / ".lock", "busy"):
        (tmp_path / "a" / "work").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["work"]


def test_a_lock_that_is_held_is_waited_for_or_refused(tmp_path: Path) -> None:
    file, held, free = tmp_path / ".lock", threading.Event(), threading.Event()

    def hold() -> None:
        with alone(file, "busy"):
            held.set()
            free.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)
    with pytest.raises(InputError, match="busy"), alone(file, "busy"):
        pass
    threading.Timer(0.1, free.set).start()
    with alone(file, "busy", wait=60):
        pass
    holder.join()


def test_what_a_directory_holds(tmp_path: Path) -> None:
    assert not holds(tmp_path / "new", "stream", "state", ())
    (tmp_path / ".state.1.abcdefgh").touch()
    (tmp_path / ".lock").touch()
    assert not holds(tmp_path, "stream", "state", (".lock",))
    with pytest.raises(InputError, match=r"holds no stream \(but \.lock\)"):
        holds(tmp_path, "stream", "state", ())
    with pytest.raises(InputError, match=r"\.lock is a file; name a directory for the stream"):
        holds(tmp_path / ".lock", "stream", "state", ())
    (tmp_path / "state").touch()
    assert holds(tmp_path, "stream", "state", ())


def test_what_is_saved_is_read_or_refused(tmp_path: Path) -> None:
    class Saved(BaseModel):
        format_version: int = 2
        number: int = 0

    file = tmp_path / "state"
    for text, said in (
        ("[]", "damaged"),
        ("{", "damaged"),
        ('{"format_version": 2, "number": "x"}', "damaged"),
        ('{"format_version": 1}', "format 1, and this mergekit-arm reads 2: go on with"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=said):
            read_saved(file, Saved)
    file.write_text('{"format_version": 2, "number": 3}')
    assert read_saved(file, Saved).number == 3


def test_the_first_difference_is_named() -> None:
    assert difference({"a": "1"}, {"a": "1"}) is None
    assert difference({"a": "1", "b": "2"}, {"b": "3", "a": "1"}) == "b was 2 and is now 3"
    assert difference({}, {"a": "1"}) == "a was not set and is now 1"
    assert difference({"a": "1"}, {}) == "a was 1 and is now not set"
