"""Small verbs on files: atomic writes, publishing a directory, sizes.

Whatever is not finished has the name that it will get, with a dot before and an ending behind it:
:func:`unfinished` finds it when the work goes on.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit_arm.errors import InputError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_text(path: Path, text: str, *, staging: Path | None = None) -> None:
    """Write ``text`` in UTF-8 as :func:`write_bytes` writes."""
    write_bytes(path, text.encode(), staging=staging)


def write_bytes(path: Path, content: bytes, *, staging: Path | None = None) -> None:
    """Write ``content`` to ``path``: the old content or the new, at every moment.

    The unfinished file lies in ``staging``, a directory on the same disk; beside ``path`` by
    default.
    """
    with replacement(path, staging=staging) as unfinished:
        unfinished.write_bytes(content)


@contextmanager
def replacement(path: Path, *, staging: Path | None = None) -> Iterator[Path]:
    """Give a file to write in the place of ``path``, which is replaced when the block is through.

    At every moment ``path`` is what it was or what it becomes, after a power failure too. The
    unfinished file lies in ``staging``, a directory on the same disk; beside ``path`` by
    default. It is removed should the block fail. Its name tells whose it is should this process
    be killed: ``.<name>.<process>.<random>``.
    """
    prefix = f".{path.name}.{os.getpid()}."
    descriptor, name = tempfile.mkstemp(prefix=prefix, dir=staging or path.parent)
    os.close(descriptor)
    unfinished = Path(name)
    try:
        yield unfinished
        unfinished.chmod(0o666 & ~_umask())
        flush(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    flush(path.parent)


def publish(staging: Path, final: Path) -> None:
    """Flush the finished directory ``staging`` and rename it to ``final``, which must be absent."""
    mask = _umask()
    staging.chmod(0o777 & ~mask)
    for path in staging.rglob("*"):
        # safetensors makes files that only their owner can read.
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        flush(path)
    flush(staging)
    staging.rename(final)
    flush(final.parent)


def try_writing(path: Path, remedy: str = "give another OUT") -> None:
    """Write a file beside where ``path`` will be, so that what prevents it shows now.

    Directories that this takes are made. Nothing is left behind.

    Raises:
        InputError: nothing can be written there; with ``remedy``.
    """
    parent = path.absolute().parent
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=parent) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); {remedy}") from error
    finally:
        for folder in missing:
            with suppress(OSError):  # never made, or of use to somebody else by now
                folder.rmdir()


def fresh_directory(path: Path) -> Path:
    """Return ``path`` as an empty directory, removing what was there."""
    remove(path)
    path.mkdir(parents=True)
    return path


@contextmanager
def scratch_at(folder: Path) -> Iterator[Path]:
    """Give ``folder`` as an empty directory for the duration of the block."""
    try:
        yield fresh_directory(folder)
    finally:
        remove(folder)


def remove(path: Path) -> None:
    """Remove a file, link or directory, if it exists.

    A directory gets another name first, so that no half-removed one is ever seen under its own.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        doomed = Path(tempfile.mkdtemp(prefix=".removed.", dir=path.parent))
        path.rename(doomed / path.name)
        shutil.rmtree(doomed)


def unfinished(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return what a killed process has left half-way in the place of ``names`` in ``folder``.

    Nothing else that begins with a dot: a repository, settings, a cache of the user's.
    """
    # The endings are ours: a process, and eight characters of tempfile's alphabet.
    known = "|".join(map(re.escape, (*names, "removed")))
    ours = re.compile(rf"\.({known})\.(partial|(\d+\.)?[a-z0-9_]{{8}})")
    return [path for path in sorted(folder.glob(".*")) if ours.fullmatch(path.name)]


def no_room(error: BaseException | None) -> bool:
    """Say whether an error, or one that it came from, is of a disk that is full, or a quota."""
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) in _NO_ROOM:
            return True
        if any(f"(os error {number})" in text for number in _NO_ROOM):  # as safetensors says it
            return True
        if isinstance(error, sqlite3.OperationalError) and "disk" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def size_of(path: Path) -> int:
    """Return the bytes of all files in a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sampled_hash(path: Path) -> str:
    """Return the SHA-256 of a file's size and of 64 pieces of it, from end to end.

    All of a file of up to 256 KiB. A change between the pieces of a larger one that leaves its
    size as it is goes unnoticed.
    """
    size, piece = path.stat().st_size, 4096
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= 64 * piece:
            digest.update(file.read())
            return digest.hexdigest()
        for number in range(64):
            file.seek(number * (size - piece) // 63)
            digest.update(file.read(piece))
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush(path: Path) -> None:
    """Make the kernel write a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_path(reference: str) -> bool:
    """Say whether ``reference`` can only mean a path here: a Hub id has one slash at most."""
    return reference.startswith((".", "/", "~")) or reference.count("/") > 1
