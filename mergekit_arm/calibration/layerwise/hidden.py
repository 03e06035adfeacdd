"""Hidden states between two layers: in memory up to a budget, on disk beyond it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_arm.calibration.running.progress import SavedProgress
from mergekit_arm.files import flush

Key = tuple[str, int]
"""Whose states, and how many layers they have passed."""

_TENSOR = "x"


class HiddenStates:
    """What every batch hands from layer to layer, on the CPU.

    Files are written once and never changed: what the last saved progress refers to stays until
    the next one is saved.
    """

    def __init__(self, progress: SavedProgress, budget: int) -> None:
        """Start empty; ``budget`` is in bytes."""
        self._progress = progress
        self._budget = budget
        self._held: dict[Key, Tensor] = {}
        self._bytes = 0
        self._files: set[Key] = set()
        self._saved: set[Key] = set()

    def put(self, key: Key, states: Tensor) -> None:
        """Keep ``states``; where the budget is spent, in a file."""
        states = states.detach().cpu()
        if states.untyped_storage().nbytes() > states.nbytes:
            states = states.clone()  # a view would keep all that it is a view of
        if self._bytes + states.nbytes <= self._budget:
            self._held[key] = states
            self._bytes += states.nbytes
        else:
            self._write(key, states)

    def get(self, key: Key) -> Tensor:
        """Return what was put; mapped from its file where it is in one."""
        if key in self._held:
            return self._held[key]
        with safe_open(self._path(key), framework="pt") as file:
            states: Tensor = file.get_tensor(_TENSOR)
        return states

    def drop(self, key: Key) -> None:
        """Let go of what was put."""
        held = self._held.pop(key, None)
        if held is not None:
            self._bytes -= held.nbytes
        if key in self._files and key not in self._saved:
            self._remove(key)

    def persist(self, keys: Iterable[Key]) -> None:
        """Make sure that all of ``keys`` are in files, before progress is saved that needs them."""
        for key in keys:
            if key in self._held and key not in self._files:
                self._write(key, self._held[key])
            if key not in self._saved:
                flush(self._path(key))

    def settle(self, keys: Iterable[Key]) -> None:
        """Remove files that only earlier progress needed: ``keys`` are what the saved one needs."""
        now = set(keys)
        for key in self._saved - now:
            self._remove(key)
        self._saved = now

    def adopt(self, keys: Iterable[Key]) -> None:
        """Take over the files of an earlier run that saved ``keys``, and remove its others."""
        self._saved = set(keys)
        self._files = set(self._saved)
        wanted = {self._path(key) for key in self._saved}
        for path in self._progress.files("hidden"):
            if path not in wanted:
                path.unlink()

    def _write(self, key: Key, states: Tensor) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({_TENSOR: states.contiguous()}, path)
        self._files.add(key)

    def _remove(self, key: Key) -> None:
        self._path(key).unlink(missing_ok=True)
        self._files.discard(key)

    def _path(self, key: Key) -> Path:
        return self._progress.path(f"hidden.{key[0]}.{key[1]}")
