"""Open a statistics directory, local or on the Hub, and read it lazily."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mergekit_arm.errors import InputError, first_line
from mergekit_arm.statistics.format import WeightRecord
from mergekit_arm.statistics.kinds.subspace import columns_for_energy, orthonormal
from mergekit_arm.statistics.locate import locate, read_metadata, version
from mergekit_arm.statistics.matching import Matcher
from mergekit_arm.statistics.write import PROBES
from mergekit_arm.tensors import TensorFiles

LOG = logging.getLogger(__name__)

_KEPT = 4
"""Sites whose finished values stay in memory."""


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
        self.metadata = read_metadata(reference, path)
        try:
            self._files = TensorFiles(path, keep_open=True)
            self._probes = self._files.get(PROBES)
        except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(
                f"activation_stats {reference}: cannot read its tensors ({first_line(error)}); "
                "copy or measure it again"
            ) from error
        # Where subspaces alone were measured, the inputs of norms have nothing to store.
        only_subspaces = "importance" not in self.metadata.settings.statistics
        absent = [
            name
            for name, site in self.metadata.sites.items()
            if not any(f"{name}.{key}" in self._files for key in ("abs_sum", "basis", "sketch"))
            and not (only_subspaces and site.no_subspace is not None)
        ]
        if absent:
            raise InputError(
                f"activation_stats {reference}: {len(absent)} sites have no tensors, "
                f"first {absent[0]}; copy or measure it again"
            )
        self.matcher = Matcher(reference, self.metadata, self._probes)
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self._recent: dict[tuple[str, str | float], Tensor] = {}

    def importance(self, record: WeightRecord, kind: str) -> Tensor:
        """Return the importance of the weight's input channels, float32, ≥ 0, unnormalised.

        Args:
            record: a measured weight (``record.site`` is set).
            kind: ``mean_abs`` (mean |x|, the AIM paper's) or ``rms`` (√ mean x²).

        Returns:
            ``(in,)``, or ``(experts, in)`` for a fused weight with one row for each expert.
            Rows of experts that saw fewer than the recorded minimum of tokens are zero.
        """
        assert record.site is not None
        site = record.site
        values = self._once((site, kind), lambda: self._read_importance(site, kind))
        return values if record.row is None else values[record.row]

    def _read_importance(self, name: str, kind: str) -> Tensor:
        site = self.metadata.sites[name]
        # With --multi-gpu, mergekit makes a GPU the default device.
        tokens = torch.tensor(site.tokens, dtype=torch.float64, device="cpu")
        starved = tokens < max(self.metadata.settings.min_expert_tokens, 1)
        values = self.tensor(name, "abs_sum" if kind == "mean_abs" else "square_sum")
        values = values.double() / tokens.clamp(min=1)[..., None]
        if kind == "rms":
            values = values.sqrt()
        if tokens.ndim:
            values = values.masked_fill(starved[..., None], 0)
            self._warn_starved(name, starved)
        if not torch.isfinite(values).all():
            raise InputError(
                f"activation_stats {self.reference}: values of {name} are not finite; "
                "measure it again"
            )
        return values.float()

    def _warn_starved(self, site: str, starved: Tensor) -> None:
        experts = starved.nonzero().flatten().tolist()
        with self._lock:
            if not experts or site in self._warned:
                return
            self._warned.add(site)
        listed = ", ".join(map(str, experts[:8])) + (", …" if len(experts) > 8 else "")
        LOG.warning(
            "%s: %d of %d experts (%s) saw fewer than %d tokens: they are left as merged",
            site,
            len(experts),
            len(starved),
            listed,
            max(self.metadata.settings.min_expert_tokens, 1),
        )

    def subspace(self, record: WeightRecord, energy: float) -> Tensor | None:
        """Return the basis of a weight's dominant input subspace.

        Args:
            record: a measured weight (``record.site`` is set).
            energy: p in (0, 1], the share of the second moment's trace to hold.

        Returns:
            (in, k) float32, orthonormal columns by falling eigenvalue; None where the run left
            subspaces out on purpose (the output head, norms).

        Raises:
            InputError: subspaces were not measured, or hold less energy than asked for.
        """
        assert record.site is not None
        site = record.site
        if self.metadata.sites[site].no_subspace is not None:
            return None
        return self._once((site, energy), lambda: self._read_basis(site, energy))

    def _once(self, key: tuple[str, str | float], read: Callable[[], Tensor]) -> Tensor:
        """Return what ``read`` made, from memory if it is among the last few.

        Weights of one site follow each other, if not at once: q, k, v; gate, up.
        """
        with self._lock:
            if key in self._recent:
                return self._recent[key]
        value = read()
        with self._lock:
            self._recent[key] = value
            while len(self._recent) > _KEPT:
                del self._recent[next(iter(self._recent))]
        return value

    def _read_basis(self, name: str, energy: float) -> Tensor:
        site = self.metadata.sites[name]
        where = f"activation_stats {self.reference}: {name}"
        stored = self.tensor(name, "basis")
        if stored.shape[0] != site.width:
            raise InputError(
                f"{where}: its basis has {stored.shape[0]} rows for {site.width} inputs; "
                "copy or measure it again"
            )
        count = columns_for_energy(
            self.tensor(name, "eigenvalues"),
            float(self.tensor(name, "trace")),
            energy,
            measured=self.metadata.settings.energy or 1.0,
            where=where,
        )
        return orthonormal(stored[:, :count], where)

    def tensor(self, site: str, key: str) -> Tensor:
        """Read ``<site>.<key>``.

        Raises:
            InputError: the directory does not hold this statistic.
        """
        full = f"{site}.{key}"
        if full not in self._files:
            measured = ", ".join(self.metadata.settings.statistics)
            raise InputError(
                f"activation_stats {self.reference}: {key} of {site} was not measured "
                f"(it holds: {measured}); calibrate again with --statistics all"
            )
        return self._files.get(full)

    def holds(self, site: str, key: str) -> bool:
        """Say whether there is a ``<site>.<key>``."""
        return f"{site}.{key}" in self._files

    def stored(self, name: str) -> Tensor:
        """Read a tensor that belongs to no site.

        Raises:
            KeyError: there is none of that name.
        """
        return self._files.get(name)

    def probe(self, record: WeightRecord) -> Tensor:
        """Return the stored probe of a weight, float32."""
        return self._probes[record.probe]


_OPEN: dict[tuple[str, str], tuple[Path, tuple[int, int], Statistics]] = {}
_OPEN_LOCK = threading.Lock()


def open_statistics(reference: str) -> Statistics:
    """Open ``reference`` (a directory, or ``org/name[@revision]`` on the Hub), once.

    Opened statistics are shared; a directory that has been replaced since is opened again. A
    merge asks for every tensor, so that what is open costs no more than a look at one file.

    Raises:
        InputError: it is neither, or it cannot be read.
    """
    key = (reference, os.getcwd())
    with _OPEN_LOCK:
        if key in _OPEN:
            path, opened, statistics = _OPEN[key]
            if version(reference, path) == opened:
                return statistics
        path = locate(reference)
        statistics = Statistics(reference, path)
        _OPEN[key] = path, version(reference, path), statistics
        return statistics


def forget(path: Path) -> None:
    """Let go of the directory ``path``: a long run would keep every one that it ever read."""
    with _OPEN_LOCK:
        for key, (opened, _, _) in list(_OPEN.items()):
            if opened == path.resolve():
                del _OPEN[key]
