"""Which of the four kinds a directory is, by what it holds, and its page as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mergekit_arm.errors import InputError
from mergekit_arm.files import write_text
from mergekit_arm.reporting.merged import CONFIG, Progress, merged_page
from mergekit_arm.reporting.page import Page, load_plotly, render
from mergekit_arm.reporting.statistics import statistics_page
from mergekit_arm.reporting.stream import stream_page
from mergekit_arm.reporting.tune import tune_page
from mergekit_arm.statistics.format import METADATA_FILE
from mergekit_arm.statistics.read import open_statistics
from mergekit_arm.streaming import layout as stream_layout
from mergekit_arm.streaming.state import read_state
from mergekit_arm.tuning import layout as tune_layout

DirectoryKind = Literal["statistics", "merged", "stream", "tune"]

_SIGNS: dict[str, DirectoryKind] = {
    stream_layout.STATE_FILE: "stream",
    tune_layout.STATE_FILE: "tune",
    CONFIG: "merged",  # before the next: beside a merged model lies what is said of its statistics
    METADATA_FILE: "statistics",
}
"""A file that only one kind of directory holds → the kind; the first one that is there decides."""


_START = b"<!doctype html>"
"""How a page begins, in small letters."""


def recognise(directory: Path) -> DirectoryKind:
    """Say which kind of directory this is.

    Raises:
        InputError: none of the four.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "no such directory"
        raise InputError(f"{directory}: {what}; name a directory of statistics, a merged model, or "
                         "what `stream` or `tune` wrote")  # fmt: skip
    for sign, kind in _SIGNS.items():
        if (directory / sign).is_file():
            return kind
    raise InputError(
        f"{directory}: it holds none of {', '.join(_SIGNS)}, so it is no directory of statistics, "
        "no model that mergekit merged, no stream and no search"
    )


def report(
    directory: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> DirectoryKind:
    """Write the page on ``directory`` to the file ``out``, and say what it is a page on.

    Holds one tensor's inputs at a time.

    Args:
        directory: statistics, a merged model, a stream or a search.
        out: the file; its directory must exist.
        force: replace the file, if it is a page.
        progress: called with tensors done and tensors in all, while a merge's inputs are read.

    Raises:
        InputError: ``directory`` is none of these or damaged, ``out`` exists or cannot be
            written, or plotly is not installed.
    """
    directory, out = Path(directory), Path(out)
    load_plotly()
    _check_out(out, force)
    kind = recognise(directory)
    text = render(_page(kind, directory, progress))
    try:
        write_text(out, text)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}; give another -o") from error
    return kind


def _page(kind: DirectoryKind, directory: Path, progress: Progress | None) -> Page:
    if kind == "statistics":
        return statistics_page(open_statistics(str(directory)))
    if kind == "merged":
        return merged_page(directory, progress)
    if kind == "tune":
        return tune_page(directory)
    state = read_state(directory)
    assert state is not None  # its file is there
    return stream_page(directory, state)


def _check_out(out: Path, force: bool) -> None:
    if out.is_dir():
        raise InputError(f"{out} is a directory; name a file, such as {out / 'report.html'}")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: there is no directory {out.absolute().parent}; make it first")
    if not out.exists():
        return
    if not force:
        raise InputError(f"{out} exists; give another -o, or --force to replace it")
    with out.open("rb") as file:
        start = file.read(len(_START))
    if start and start.lower() != _START:  # a mistyped path costs nobody a model
        raise InputError(f"{out} exists and is no page; it will not be replaced: give another -o")
