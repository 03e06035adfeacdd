"""Local files of rows: which of them a name means, and what reads them."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mergekit_arm.errors import InputError

BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".txt": "text",
    ".csv": "csv",
    ".parquet": "parquet",
}
"""What ``datasets`` calls the reader of a kind of file."""

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")

LARGE = 1_000_000_000  # bytes
"""From this size on files are read as a stream, so that not all of them is converted first."""
_DEFLATED = 4  # times a compressed text's size is about the text's


@dataclass(frozen=True)
class DataFiles:
    """Files of one kind."""

    builder: str
    paths: tuple[Path, ...]

    @property
    def patterns(self) -> list[str]:
        """The paths as ``datasets`` wants them: it takes every name for a pattern."""
        return [glob.escape(str(path.absolute())) for path in self.paths]

    @property
    def large(self) -> bool:
        """Whether the rows are too many to be converted before the first is read."""
        return are_large(self.paths)


def are_large(paths: Iterable[Path]) -> bool:
    """Say whether files hold too many rows to be converted before the first is read."""
    sizes = (
        path.stat().st_size * (_DEFLATED if path.suffix.lower() in COMPRESSIONS else 1)
        for path in paths
    )
    return sum(sizes) >= LARGE


def looks_local(name: str) -> bool:
    """Say whether ``name`` can only be a path."""
    return name.startswith((".", "/", "~")) or _kind(Path(name)) is not None


def data_files(name: str) -> DataFiles | None:
    """Return the files that ``name`` means, or None where it may be a name on the Hub.

    A file, or a pattern such as ``./data/*.jsonl`` where no file has that very name. A directory
    is the files in it if they are all text; ``datasets`` knows best what other directories hold.

    Raises:
        InputError: no such file, of a kind that cannot be read, empty, or of several kinds.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _of_directory(name, path)
    if path.is_file():
        found = [path]
    elif glob.has_magic(name) and (looks_local(name) or "*" in name):
        found = [Path(one) for one in sorted(glob.glob(str(path), recursive=True))]
        found = [one for one in found if one.is_file()]
        if not found:
            raise InputError(f"--dataset {name}: no file matches this pattern")
    elif looks_local(name):
        raise InputError(f"--dataset {name}: no such file or directory")
    else:
        return None
    return _of_one_kind(name, found)


def _of_directory(name: str, path: Path) -> DataFiles | None:
    found = sorted(one for one in path.rglob("*") if _kind(one) and one.is_file())
    kinds = {_kind(one) for one in found}
    # datasets would read text line by line, and takes brackets in a directory's name for a pattern.
    if kinds == {"text"} or (kinds and glob.has_magic(str(path))):
        return _of_one_kind(name, found)
    return None


def _of_one_kind(name: str, paths: Iterable[Path]) -> DataFiles:
    paths = tuple(paths)
    kinds = {path: _kind(path) for path in paths}
    for path, kind in kinds.items():
        if kind is None:
            raise InputError(
                f"--dataset {path}: cannot read {path.suffix or 'a file without suffix'}; use one "
                f"of {' '.join(BUILDERS)}, as it is or with {' '.join(COMPRESSIONS)} behind, "
                "or a directory"
            )
    builders = sorted({kind for kind in kinds.values() if kind})
    if len(builders) > 1:
        raise InputError(
            f"--dataset {name}: files of several kinds ({', '.join(builders)}); "
            "give one --dataset for each kind"
        )
    filled = tuple(path for path in paths if path.stat().st_size > 0)
    if not filled:
        raise InputError(f"--dataset {name}: the file is empty; give one that has rows")
    return DataFiles(builders[0], filled)


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        suffix = Path(path.stem).suffix.lower()
    return BUILDERS.get(suffix)
