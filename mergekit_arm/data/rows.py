"""Rows of a data set: a local file or directory, or a name on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_arm.errors import InputError, did_you_mean, first_line

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".txt": "text",
    ".csv": "csv",
    ".parquet": "parquet",
}


def load_rows(name: str, subset: str | None, split: str | None) -> tuple[Dataset, str | None]:
    """Load one split of a data set: a local file or directory, or a name on the Hub.

    Text files are read paragraph by paragraph. Returns the rows and the split's name (None
    for a single file).

    Raises:
        InputError: no such file, data set, subset or split, or no network.
    """
    import datasets

    datasets.disable_progress_bars()
    path = Path(name).expanduser()
    if path.is_file():
        builder = _BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise InputError(
                f"--dataset {name}: cannot read {path.suffix or 'a file without suffix'}; "
                f"use one of {' '.join(_BUILDERS)}, or a directory"
            )
        if split not in (None, "train"):  # what the library calls all of a file
            raise InputError(f"--split {split}: {name} is one file, without splits; leave it out")
        extra: dict[str, Any] = {"sample_by": "paragraph"} if builder == "text" else {}
        loaded = _loading(
            name, lambda: datasets.load_dataset(builder, data_files=str(path), **extra)
        )
        return loaded["train"], None
    if not path.is_dir() and (path.suffix.lower() in _BUILDERS or name.startswith((".", "/", "~"))):
        raise InputError(f"--dataset {name}: no such file or directory")
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        loaded = _loading(name, lambda: datasets.load_from_disk(str(path)))
    else:
        source = str(path) if path.is_dir() else name
        wanted = split or ("validation" if name == DEFAULT_DATASET else None)
        loaded = _loading(name, lambda: datasets.load_dataset(source, subset, split=wanted))
        split = wanted
    if isinstance(loaded, datasets.Dataset):
        return loaded, split
    chosen = split or ("train" if "train" in loaded else next(iter(loaded)))
    if chosen not in loaded:
        raise InputError(
            f"--split {chosen}: {name} has {', '.join(loaded)}{did_you_mean(chosen, loaded)}"
        )
    if split is None and len(loaded) > 1 and "train" not in loaded:
        raise InputError(f"{name} has several splits ({', '.join(loaded)}): choose with --split")
    return loaded[chosen], chosen


def _loading(name: str, load: Any) -> Any:
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        return load()
    except (ConnectionError, DatasetNotFoundError) as error:
        raise InputError(
            f"data set {name!r} cannot be reached ({first_line(error)}); "
            "without a network, give a local file: --dataset FILE"
        ) from error
    except (OSError, ValueError, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise InputError(f"data set {name!r} cannot be read: {first_line(cause)}") from error


DEFAULT_DATASET = "mit-han-lab/pile-val-backup"
"""The AIM authors' calibration data, split ``validation``."""
