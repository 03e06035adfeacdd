"""Calibrations of a tiny model that end early, and what they leave."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit_arm.calibration.calibrate import CalibrationOptions, calibrate

WAYS = [False, True]
"""Whether with ``--low-memory``."""


class Killed(BaseException):
    """The end of a process, as far as a test inside it can come."""


def options(family: Path, out: Path, dataset: Path, **rest: Any) -> CalibrationOptions:
    """Return options with which progress is saved after every batch."""
    settings = {"model": str(family / "base"), "batch_size": 2, "save_every": "0"}
    return CalibrationOptions(out=str(out), dataset=str(dataset), **{**settings, **rest})


def undisturbed(family: Path, dataset: Path, folder: Path) -> list[Path]:
    """Run to the end, for each of ``WAYS``."""
    outs = [folder / f"low-memory-{low_memory}" for low_memory in WAYS]
    for low_memory, out in zip(WAYS, outs, strict=True):
        calibrate(options(family, out, dataset, low_memory=low_memory))
    return outs


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a directory but the card, which has the directory's name in it."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "README.md"}


def kill_at(number: int) -> Callable[[int, int], None]:
    """Return a progress report that ends the run at the ``number``-th batch."""
    count = itertools.count(1)

    def report(_done: int, _total: int) -> None:
        if next(count) == number:
            raise Killed

    return report
