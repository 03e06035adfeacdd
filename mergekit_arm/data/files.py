"""Local files of rows: which of them a name means, and what reads them."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
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

_SPLIT = re.compile(
    r"(?:^|[-._ 0-9/\\])"
    r"(?:train|training|validation|valid|dev|val|test|testing|eval|evaluation)"
    r"(?:[-._ 0-9/\\]|$)"
)
"""A word in a path by which ``datasets`` takes a file for a part of a split."""
_ABOUT = ("dataset_infos.json", "dataset_info.json")
"""Files that tell about data, and hold none."""

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
    def identity(self) -> str:
        """A word that is another one as soon as a file is replaced or written to."""
        found = [(one.st_size, one.st_ino, one.st_ctime_ns) for one in map(Path.stat, self.paths)]
        return f"files-{sha256(repr(found).encode()).hexdigest()[:16]}"

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
    is all files in it, but for one that is laid out in splits or was saved by ``datasets``, which
    knows best what that holds.

    Raises:
        InputError: no such file, of a kind that cannot be read, empty, or of several kinds; a
            model; or a directory of which only a part is laid out in splits.
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
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        raise InputError(f"--dataset {name}: this is a model; name the text to measure it on")
    if is_saved(path) or _is_described(path / "README.md"):
        return None
    inside = {one: str(one.relative_to(path)) for one in sorted(path.rglob("*")) if one.is_file()}
    found = [
        one
        for one, where in inside.items()
        if _kind(one) and one.name not in _ABOUT and not where.startswith((".", "__"))
    ]
    # datasets would read text line by line, and takes brackets in a directory's name for a pattern.
    if {_kind(one) for one in found} == {"text"} or (found and glob.has_magic(str(path))):
        return _of_one_kind(name, found)
    splits = [one for one in found if _SPLIT.search(inside[one])]
    if len(splits) == len(found):
        return None
    if splits:
        # datasets would read those alone, as whatever split they look like.
        other = next(one for one in found if one not in splits)
        raise InputError(
            f"--dataset {name}: {inside[splits[0]]} is named like a split, and {inside[other]} is "
            f"in none: name the files that are meant, such as {name}/*{other.suffix}"
        )
    return _of_one_kind(name, found)


def is_saved(path: Path) -> bool:
    """Say whether ``datasets`` has saved this directory, which it then reads itself."""
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _is_described(card: Path) -> bool:
    """Say whether a data set's card names its files."""
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8", errors="replace")
    return text.startswith("---") and "\nconfigs:" in text


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
