"""Open a statistics directory, local or on the Hub, and read it lazily."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from torch import Tensor

from mergekit_arm.errors import InputError, first_line, visible
from mergekit_arm.statistics.checks import check_values, problems
from mergekit_arm.statistics.digest import tensor_digest
from mergekit_arm.statistics.kinds import kinds
from mergekit_arm.statistics.kinds.base import Kind, TensorSpec
from mergekit_arm.statistics.locate import (
    TensorFiles,
    Version,
    locate,
    read_metadata,
    version,
)
from mergekit_arm.statistics.matching import Matcher
from mergekit_arm.statistics.write import PROBES

T = TypeVar("T")

_KEPT = 4
"""Finished values of sites that stay in memory."""


Identity = tuple[str, Version]
"""Where a directory lies, and what changes when a file in it is replaced. Can be pickled."""


class Statistics:
    """A statistics directory: metadata and probes in memory, everything else read on demand.

    Safe to share between threads (mergekit's multi-GPU executor uses them).
    """

    def __init__(self, reference: str, path: Path) -> None:
        """Open the directory at ``path``; ``reference`` is what the user wrote, for messages.

        Raises:
            InputError: not a statistics directory, another format version, or a file in it
                that is unreadable, truncated or incomplete.
        """
        self.reference = reference
        self._path = path
        self._version = version(reference, path)
        self.metadata = read_metadata(reference, path)
        try:
            self._files = TensorFiles(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(
                f"activation_stats {reference}: cannot read its tensors ({first_line(error)}); "
                "copy or measure it again"
            ) from error
        for trouble in problems(self.metadata, self.kinds(), PROBES, self._files.header):
            raise InputError(
                f"activation_stats {reference} are damaged: {visible(trouble)}; copy or measure "
                "them again"
            )
        self._specs = {
            key: spec
            for kind in self.kinds()
            for key, spec in {**kind.state(1), **kind.stored(1)}.items()
        }
        self._probes = self._get(PROBES)
        self.matcher = Matcher(reference, self.metadata, self._probes)
        self._lock = threading.Lock()
        self._seen: set[Hashable] = set()
        self._recent: dict[Hashable, Any] = {}

    def kinds(self) -> list[Kind]:
        """Return the kinds that were measured; one that is not registered is left out."""
        settings = self.metadata.settings
        return [
            kind.configured(kind.from_record(settings))
            for kind in kinds()
            if kind.name in settings.statistics
        ]

    def once(self, key: Hashable, read: Callable[[], T]) -> T:
        """Return what ``read`` made for ``key``, from memory if it is among the last few used.

        Weights of one site follow each other, if not at once: q, k, v; gate, up.
        """
        with self._lock:
            if key in self._recent:
                self._recent[key] = found = self._recent.pop(key)
                return found  # type: ignore[no-any-return]  # of this key, so of this type
        value = read()
        with self._lock:
            self._recent[key] = value
            while len(self._recent) > _KEPT:
                del self._recent[next(iter(self._recent))]
        return value

    def first(self, key: Hashable) -> bool:
        """Say whether this is the first call with ``key``: for warnings that are said once."""
        with self._lock:
            seen = key in self._seen
            self._seen.add(key)
        return not seen

    def tensor(self, site: str, key: str) -> Tensor:
        """Read ``<site>.<key>``.

        Raises:
            InputError: the directory does not hold this statistic, its values are not finite,
                out of their range or not those that were written, or it has changed since it was
                opened.
        """
        full = f"{site}.{key}"
        if full not in self._files:
            measured = ", ".join(self.metadata.settings.statistics)
            raise InputError(
                f"activation_stats {self.reference}: {key} of {site} was not measured "
                f"(it holds: {measured}); calibrate again with --statistics all"
            )
        self._check_unchanged()
        return self._get(full, self._specs.get(key))

    @property
    def identity(self) -> Identity:
        """Which directory this is: another one, or a changed one, has another identity."""
        return str(self._path), self._version

    @property
    def stored_bytes(self) -> int:
        """The size of the files that hold the tensors."""
        files = [*self._path.glob("*.safetensors")]
        return sum(file.stat().st_size for file in files)

    def probe(self, name: str) -> Tensor:
        """Return the probe of a weight of the checkpoint: (32,) float32."""
        return self._probes[self.metadata.weights[name].probe]

    @property
    def names(self) -> list[str]:
        """Names of all stored tensors."""
        return sorted(self._files.header)

    @property
    def current(self) -> bool:
        """Whether the directory is still the one that was opened, its files unchanged."""
        moved = os.path.isdir(self.reference) and Path(self.reference).resolve() != self._path
        return not moved and version(self.reference, self._path) == self._version

    def _check_unchanged(self) -> None:
        if version(self.reference, self._path) != self._version:
            raise InputError(
                f"activation_stats {self.reference}: files in {self._path} have changed since "
                "they were opened; a merge would mix two measurements: run it again"
            )

    def holds(self, site: str, key: str) -> bool:
        """Say whether there is a ``<site>.<key>``."""
        return f"{site}.{key}" in self._files

    def stored(self, name: str) -> Tensor:
        """Read a tensor that belongs to no site.

        Raises:
            KeyError: there is none of that name.
            InputError: its values are not those that were written.
        """
        self._check_unchanged()
        return self._get(name)

    def _get(self, name: str, spec: TensorSpec | None = None) -> Tensor:
        value = self._files.get(name)
        trouble = None if spec is None else check_values(spec, value)
        digests = self.metadata.digests
        if not trouble and digests is not None and digests[name] != tensor_digest(value):
            trouble = "are not those that were written"
        if trouble:
            raise InputError(
                f"activation_stats {self.reference}: values of {visible(name)} {trouble}; "
                "copy or measure it again"
            )
        return value


_OPEN: dict[tuple[str, str], tuple[Path, Statistics]] = {}
_OPEN_LOCK = threading.Lock()


def open_statistics(reference: str) -> Statistics:
    """Open ``reference`` (a directory, or ``org/name[@revision]`` on the Hub), once.

    Opened statistics are shared; a directory that has been replaced since is opened again. A
    merge asks for every tensor, so that what is open costs no more than a look at its files.

    Raises:
        InputError: it is neither, or it cannot be read.
    """
    key = (reference, os.getcwd())
    with _OPEN_LOCK:
        if key in _OPEN:
            _, statistics = _OPEN[key]
            if statistics.current:
                return statistics
        path = locate(reference)
        statistics = Statistics(reference, path)
        _OPEN[key] = path, statistics
        return statistics


def forget(path: Path) -> None:
    """Let go of the directory ``path``: a long run would keep every one that it ever read."""
    with _OPEN_LOCK:
        for key, (opened, _) in list(_OPEN.items()):
            if opened == path.resolve():
                del _OPEN[key]
