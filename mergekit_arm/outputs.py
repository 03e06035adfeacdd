"""A directory that long work goes on in: what it holds, what is saved there, and who is at it."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import psutil
from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from mergekit_arm.errors import InputError
from mergekit_arm.files import remove

Saved = TypeVar("Saved", bound=BaseModel)


def holds(out: Path, what: str, state_file: str, ours: tuple[str, ...]) -> bool:
    """Say whether ``out`` holds a stream, a search or ``what`` else has such a ``state_file``.

    ``ours``: how names begin that may lie there before the state is saved.

    Raises:
        InputError: it is a file, cannot be made, or holds anything else.
    """
    if out.is_symlink() and not out.exists():
        raise InputError(f"{out} is a link that leads nowhere; make its goal, or give another OUT")
    if not out.exists():
        above = next(parent for parent in out.absolute().parents if parent.exists())
        if not above.is_dir():
            raise InputError(f"{out} cannot be made, for {above} is a file; give another OUT")
        return False
    if not out.is_dir():
        raise InputError(f"{out} is a file; name a directory for the {what}")
    if (out / state_file).is_file():
        return True
    begun = (*ours, f".{state_file}.")
    others = sorted(path.name for path in out.iterdir() if not path.name.startswith(begun))
    if others:
        raise InputError(
            f"{out} exists and holds no {what} (but {others[0]}); nothing there will be replaced: "
            "give another OUT"
        )
    return False


def read_saved(
    file: Path,
    kind: type[Saved],
    *,
    other_version: str = "go on with the version that began it",
    damaged: str = "give another OUT",
) -> Saved:
    """Return what ``file`` has saved, whose ``format_version`` must be the default of ``kind``.

    Raises:
        InputError: another version has written it, or it is damaged; with these remedies.
    """
    version = kind.model_fields["format_version"].default
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document.get("format_version") != version:
            raise InputError(
                f"{file}: format {document.get('format_version')}, and this mergekit-arm reads "
                f"{version}: {other_version}"
            )
        return kind.model_validate(document)
    except (OSError, ValueError, AttributeError, ValidationError) as error:
        raise InputError(f"{file} is damaged ({type(error).__name__}); {damaged}") from error


def remove_orphans(paths: Iterable[Path]) -> None:
    """Remove what dead processes had in hand, or whose names tell of none.

    A name holds its process's number between dots. What bears our own is of an earlier process
    with that number, for this is called before we have anything in hand.
    """
    for path in paths:
        number = next((int(part) for part in path.name.split(".") if part.isdigit()), 0)
        if number in (0, os.getpid()) or not psutil.pid_exists(number):
            remove(path)


def difference(old: Mapping[str, str], new: Mapping[str, str]) -> str | None:
    """Say where two fingerprints differ first; None where they do not."""
    for key in {**old, **new}:
        before, after = old.get(key, "not set"), new.get(key, "not set")
        if before != after:
            return f"{key} was {before} and is now {after}"
    return None


@contextlib.contextmanager
def alone(file: Path, busy: str, *, wait: float = 0) -> Iterator[None]:
    """Keep other processes out by the lock ``file``, for the duration of the block.

    The system drops the lock when its holder dies, by whatever signal. Directories that are made
    for it are removed again if nothing else is left in them.

    Raises:
        InputError: the directory cannot be made, or another process is at it for longer than
            ``wait`` seconds, which ``busy`` says.
    """
    folders = [file.parent, *(one for one in file.parent.parents if not one.exists())]
    while (lock := _locked(file, busy, wait)) is None:
        pass
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()
        for one in folders:
            with contextlib.suppress(OSError):  # not empty: there is something to continue
                one.rmdir()


def _locked(file: Path, busy: str, wait: float) -> FileLock | None:
    """Return the lock, held; None where its holder ended in the same moment.

    The holder has then removed the file that was opened here, or its directory, and a lock on
    what is gone keeps nobody out.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # also of a directory that is gone since, or made again
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.lstat(error.filename).st_mode):
                raise InputError(f"{error.filename} is no directory; give another OUT") from error
        return None
    except OSError as error:
        raise InputError(
            f"{file.parent} cannot be made: {error.strerror}; give another OUT"
        ) from error
    lock = FileLock(file, timeout=wait)
    # The lock makes the directory anew, which fails where others make and remove it just then.
    with contextlib.suppress(FileNotFoundError, FileExistsError), file.open("a") as opened:
        # What is opened before and is there afterwards is what was locked in between.
        try:
            lock.acquire()
            refused = None
        except Timeout as error:
            refused = error
        there = file.exists() and os.path.samestat(os.fstat(opened.fileno()), file.stat())
        if there and refused is None:
            return lock
        lock.release()
        if there:
            raise InputError(busy) from refused
    return None
