"""Rows of a data set: a local file or directory, or a name on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from lzma import LZMAError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_arm.data.files import are_large, data_files, is_saved
from mergekit_arm.data.settings import DEFAULT_DATASET
from mergekit_arm.errors import InputError, did_you_mean, first_line

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


SHUFFLE_BUFFER = 2048
"""Rows of a stream that are held and drawn from; the order of the files is shuffled as well."""


def load_rows(
    name: str, subset: str | None, split: str | None, *, whole: bool = False
) -> tuple[Dataset | IterableDataset, str | None]:
    """Open one split of a data set: a local file or directory, or a name on the Hub.

    Text files are read paragraph by paragraph. What is on the Hub, and local data of a gigabyte
    and more, is read as a stream: only as much of them as is used, unless ``whole``. Returns the
    rows and the split's name (None for single files).

    Raises:
        InputError: no such file, data set, subset or split, nothing in it, or no network.
    """
    import datasets  # half a second, which --help need not take

    files = data_files(name)
    if files is not None:
        if split not in (None, "train"):  # what the library calls all of a file
            raise InputError(f"--split {split}: {name} is one file, without splits; leave it out")
        by_paragraph = {"sample_by": "paragraph"} if files.builder == "text" else {}
        with _reading(f"data set {name!r}"), _without_bars():
            loaded = datasets.load_dataset(
                files.builder,
                # The library keeps what it has converted by path and time of change, which
                # another file may share; a name of its own for each keeps them apart.
                name=files.identity,
                data_files=files.patterns,
                streaming=files.large and not whole,
                **by_paragraph,
            )
        return loaded["train"], None
    path = Path(name).expanduser()
    if path.is_dir():
        return _of_directory(name, path, subset, split, whole=whole)
    wanted = split or ("validation" if name == DEFAULT_DATASET else None)
    # Without a network the library takes what it has in its cache.
    with _reading(f"data set {name!r}"):
        loaded = datasets.load_dataset(name, subset, split=wanted, streaming=not whole)
    return _chosen(name, loaded, wanted)


def _of_directory(
    name: str, path: Path, subset: str | None, split: str | None, *, whole: bool
) -> tuple[Dataset | IterableDataset, str | None]:
    import datasets  # as above

    with _reading(f"data set {name!r}"), _without_bars():
        if is_saved(path):
            return _chosen(name, datasets.load_from_disk(str(path)), split)
        streamed = not whole and are_large(one for one in path.rglob("*") if one.is_file())
        loaded = datasets.load_dataset(str(path), subset, split=split, streaming=streamed)
        return _chosen(name, loaded, split)


def _chosen(
    name: str, loaded: Any, split: str | None
) -> tuple[Dataset | IterableDataset, str | None]:
    if not isinstance(loaded, dict):
        return loaded, split
    chosen = split or ("train" if "train" in loaded else next(iter(loaded)))
    if chosen not in loaded:
        raise InputError(
            f"--split {chosen}: {name} has {', '.join(loaded)}{did_you_mean(chosen, loaded)}"
        )
    if split is None and len(loaded) > 1 and "train" not in loaded:
        raise InputError(f"{name} has several splits ({', '.join(loaded)}): choose with --split")
    return loaded[chosen], chosen


def columns_of(rows: Dataset | IterableDataset) -> list[str]:
    """Return the names of the columns; reads a stream's first row where it does not say."""
    with _reading("the data"):
        return list(rows.column_names or next(iter(rows), {}))


def first_rows(
    rows: Dataset | IterableDataset, seed: int, columns: list[str], count: int
) -> list[dict[str, Any]]:
    """Return some rows to look at: the first of a stream, so that little of it is read twice."""
    if not hasattr(rows, "__len__"):
        with _reading("the data"):
            return list(rows.select_columns(columns).take(count))
    return list(islice(in_order(rows, seed, columns), count))


def in_order(
    rows: Dataset | IterableDataset, seed: int, columns: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows in the order that ``seed`` decides, only ``columns`` of them.

    A data set that is read whole is shuffled whole; a stream within a buffer.

    Raises:
        InputError: a row cannot be read.
    """
    if columns is not None:
        rows = rows.select_columns(columns)
    streamed = not hasattr(rows, "__len__")
    shuffled = (
        rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) if streamed else rows.shuffle(seed=seed)
    )
    with _reading("the data"):
        yield from shuffled


@contextmanager
def _reading(what: str) -> Iterator[None]:
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError  # as above
    from zstandard import ZstdError

    try:
        yield
    except (ConnectionError, DatasetNotFoundError) as error:
        raise InputError(
            f"{what} cannot be reached ({first_line(error)}); "
            "without a network, give a local file: --dataset FILE"
        ) from error
    except StopIteration as error:
        raise InputError(f"{what} holds no rows: give another --dataset") from error
    except (OSError, ValueError, EOFError, LZMAError, ZstdError, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise InputError(
            f"{what} cannot be read: {first_line(cause)}; mend it or give another --dataset"
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the library's progress bars away while it converts local files."""
    import datasets  # as above

    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
