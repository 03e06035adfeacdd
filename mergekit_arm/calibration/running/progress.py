"""Progress on disk: a run that was killed continues where it last saved.

Beside ``OUT`` lies ``OUT.partial`` while a run is under way. In it every process keeps a file of
its sums so far, exactly as they are in memory, and of how far they go. It is replaced in one
step, so it is always whole. Sites that are finished lie in files of their own, and so do the
hidden states of a walk layer by layer.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_arm.calibration.sums.sites import Site
from mergekit_arm.calibration.sums.totals import PARTS, MeasuredSite, pack, unpack
from mergekit_arm.errors import InputError, first_line
from mergekit_arm.files import replacement
from mergekit_arm.outputs import alone, difference

_RECORD = "progress"
_SUMS, _FINISHED, _PIECES = _KEPT = "sums", "finished", "pieces"


@dataclass(frozen=True)
class Snapshot:
    """What an earlier, unfinished run of the same command has left."""

    position: Mapping[str, Any]
    """Where it was, in the terms of the loop that saved it."""
    states: Mapping[str, dict[str, Tensor]]

    def restore(self, sites: Iterable[Site]) -> None:
        """Load the sums into ``sites``."""
        for site in sites:
            site.load_state(self.states[site.name])


class SavedProgress:
    """What this process has saved of a run, and saves."""

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, str],
        *,
        every: float,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        """Prepare; touches nothing.

        Args:
            folder: where progress is saved, by all processes of this host.
            fingerprint: what decides the run's numbers, by its name; a run continues only
                where all of it is the same.
            every: seconds between two savings.
            process: number of this process among ``processes``.
            processes: how many there are.
        """
        self.folder = folder
        self._prefix = f"process-{process}."
        self._fingerprint = {**fingerprint, "number of processes": str(processes)}
        self._every = every
        self._saved = time.monotonic()

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Keep other runs of the same command from this progress, for the duration of a block.

        Two that save in one place would each read what the other is about to replace.

        Raises:
            InputError: another run is at it.
        """
        busy = f"another calibration is saving in {self.folder}: wait for it, or choose another OUT"
        # Not a name that `discard` removes: the lock of a file that is gone keeps nobody out.
        return alone(self.folder / f".lock-{self._prefix}file", busy)

    def check(self, force: bool) -> None:
        """Refuse the progress of another run; with ``force``, remove it.

        Raises:
            InputError: naming what differs.
        """
        change = None
        try:
            for path in [path for kind in _KEPT for path in self.files(kind)]:
                change = change or difference(
                    self._read_record(path)["fingerprint"], self._fingerprint
                )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            change = f"it cannot be read ({first_line(error)})"
        if change and not force:
            raise InputError(
                f"{self.folder} holds the progress of another run: {change}; finish that "
                "run with its own command, choose another OUT, or start over with --force"
            )
        if change:
            self.discard()

    def position(self) -> dict[str, Any] | None:
        """Return where the saved run was, None where nothing was saved."""
        path = self.path(_SUMS)
        return dict(self._read_record(path)["position"]) if path.is_file() else None

    def load(self) -> Snapshot | None:
        """Return what was saved, None where nothing was."""
        path = self.path(_SUMS)
        if not path.is_file():
            return None
        record = self._read_record(path)
        states: dict[str, dict[str, Tensor]] = {name: {} for name in record["sites"]}
        for key, value in _read_tensors(path).items():
            site, _, entry = key.partition(PARTS)
            states[site][entry] = value.clone()
        return Snapshot(record["position"], states)

    def due(self) -> bool:
        """Say whether it is time to save."""
        return time.monotonic() - self._saved >= self._every

    def save(self, position: Mapping[str, Any], sites: Iterable[Site]) -> None:
        """Replace what was saved before; flushed, so that it outlives a power failure."""
        names: list[str] = []
        tensors: dict[str, Tensor] = {}
        for site in sites:
            names.append(site.name)
            for key, value in site.state().items():
                tensors[f"{site.name}{PARTS}{key}"] = value
        self._write(_SUMS, tensors, {"position": position, "sites": names})
        self._saved = time.monotonic()

    def finished(self) -> int:
        """Return how many parts ``finish`` has written, one after the other."""
        return self._count(_FINISHED)

    def finish(self, number: int, measured: Sequence[MeasuredSite]) -> None:
        """Keep sites that nothing will be added to any more as part ``number``."""
        self._write_sites(f"{_FINISHED}.{number}", measured)
        for path in self.files(f"{_PIECES}.{number}"):
            path.unlink()

    def read_finished(self, number: int) -> list[MeasuredSite]:
        """Return what ``finish`` kept; tensors are mapped, and read when they are used."""
        return self._read_sites(f"{_FINISHED}.{number}")

    def add_piece(self, number: int, measured: Sequence[MeasuredSite]) -> None:
        """Keep some sites of part ``number`` until the part is finished."""
        name = f"{_PIECES}.{number}"
        self._write_sites(f"{name}.{self._count(name)}", measured)
        self._saved = time.monotonic()

    def read_pieces(self, number: int) -> list[MeasuredSite]:
        """Return what ``add_piece`` kept of part ``number``."""
        name = f"{_PIECES}.{number}"
        pieces = range(self._count(name))
        return [site for piece in pieces for site in self._read_sites(f"{name}.{piece}")]

    def path(self, name: str) -> Path:
        """Return the path of this process's file of that name."""
        return self.folder / f"{self._prefix}{name}.safetensors"

    def files(self, kind: str) -> list[Path]:
        """Return this process's whole files whose names begin with ``kind``."""
        return sorted(self.folder.glob(f"{self._prefix}{kind}.*safetensors"))

    def discard(self) -> None:
        """Remove what this process has saved, and the directory with the last of it."""
        with contextlib.suppress(FileNotFoundError):  # another process removed the directory
            for name in (f"{self._prefix}*", f".{self._prefix}*"):  # whole, and half-written
                for path in self.folder.glob(name):
                    path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: other processes' progress
            self.folder.rmdir()

    def _write(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacement(self.path(name)) as unfinished:
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
                unfinished,
                metadata={_RECORD: json.dumps({"fingerprint": self._fingerprint, **record})},
            )

    def _write_sites(self, name: str, measured: Sequence[MeasuredSite]) -> None:
        tensors, sites = pack(measured)
        self._write(name, tensors, {"sites": sites})

    def _read_sites(self, name: str) -> list[MeasuredSite]:
        path = self.path(name)
        return unpack(_read_tensors(path), self._read_record(path)["sites"])

    def _count(self, name: str) -> int:
        count = 0
        while self.path(f"{name}.{count}").is_file():
            count += 1
        return count

    @staticmethod
    def _read_record(path: Path) -> dict[str, Any]:
        with safe_open(path, framework="pt") as file:
            record: dict[str, Any] = json.loads(file.metadata()[_RECORD])
        return record


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
