"""Progress on disk: a run that was killed continues where it last saved.

Beside ``OUT`` lies ``OUT.partial`` while a run is under way, with one file for each process: the
sums so far, exactly as they are in memory, and how far they go. The file is replaced in one
step, so it is always whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_arm.calibration.collect import Site
from mergekit_arm.errors import InputError, first_line

_RECORD = "progress"
_PARTS = "\x1f"  # between a site's name and the key of its state; in neither


@dataclass(frozen=True)
class Snapshot:
    """What an earlier, unfinished run of the same command has left."""

    position: Mapping[str, Any]
    """Where it was, in the terms of the loop that saved it."""
    plans: Mapping[str, list[str]]
    """Site → the parameters that read there."""
    states: Mapping[str, dict[str, Tensor]]

    def restore(self, sites: Iterable[Site]) -> None:
        """Load the sums into ``sites``."""
        for site in sites:
            site.load_state(self.states[site.name])


class Progress:
    """The progress of this process."""

    def __init__(
        self,
        out: Path,
        fingerprint: Mapping[str, str],
        *,
        every: float,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        """Prepare; touches nothing.

        Args:
            out: where the statistics will be written.
            fingerprint: what decides the run's numbers, by its name; a run continues only
                where all of it is the same.
            every: seconds between two savings.
            process: number of this process among ``processes``.
            processes: how many there are.
        """
        out = out.absolute()
        self.folder = out.parent / f"{out.name}.partial"
        self._file = self.folder / f"process-{process}.safetensors"
        self._fingerprint = {**fingerprint, "number of processes": str(processes)}
        self._every = every
        self._saved = time.monotonic()

    def check(self, force: bool) -> None:
        """Refuse the progress of another run; with ``force``, remove it.

        Raises:
            InputError: naming what differs.
        """
        try:
            earlier = self._read_record()
            difference = earlier and _difference(earlier["fingerprint"], self._fingerprint)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            difference = f"it cannot be read ({first_line(error)})"
        if difference and not force:
            raise InputError(
                f"{self.folder} holds the progress of another run: {difference}; finish that "
                "run with its own command, choose another OUT, or start over with --force"
            )
        if difference:
            self.discard()

    def load(self) -> Snapshot | None:
        """Return what was saved, None where nothing was."""
        record = self._read_record()
        if record is None:
            return None
        states: dict[str, dict[str, Tensor]] = {name: {} for name in record["sites"]}
        with safe_open(self._file, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # the file is no dictionary
                site, _, entry = key.partition(_PARTS)
                states[site][entry] = file.get_tensor(key).clone()
        return Snapshot(record["position"], record["sites"], states)

    def due(self) -> bool:
        """Say whether it is time to save."""
        return time.monotonic() - self._saved >= self._every

    def save(self, position: Mapping[str, Any], sites: Iterable[Site]) -> None:
        """Replace what was saved before; flushed, so that it outlives a power failure."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names: dict[str, list[str]] = {}
        tensors: dict[str, Tensor] = {}
        for site in sites:
            names[site.name] = [reading.parameter for reading in site.plan.readings]
            for key, value in site.state().items():
                tensors[f"{site.name}{_PARTS}{key}"] = value.detach().cpu().contiguous()
        record = {"fingerprint": self._fingerprint, "position": position, "sites": names}
        temporary = self._file.with_suffix(".writing")
        save_file(tensors, temporary, metadata={_RECORD: json.dumps(record)})
        flush(temporary)
        temporary.replace(self._file)
        flush(self.folder)
        self._saved = time.monotonic()

    def discard(self) -> None:
        """Remove what this process has saved, and the directory with the last of it."""
        for path in self.folder.glob(f"{self._file.stem}.*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: other processes' progress
            self.folder.rmdir()

    def _read_record(self) -> dict[str, Any] | None:
        if not self._file.is_file():
            return None
        with safe_open(self._file, framework="pt") as file:
            record: dict[str, Any] = json.loads(file.metadata()[_RECORD])
        return record


def flush(path: Path) -> None:
    """Make the kernel write a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _difference(old: Mapping[str, str], new: Mapping[str, str]) -> str | None:
    for key in [*new, *(key for key in old if key not in new)]:
        before, after = old.get(key, "not set"), new.get(key, "not set")
        if before != after:
            return f"its {key} was {before} and is now {after}"
    return None
