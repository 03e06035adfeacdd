"""Open a statistics directory, local or on the Hub, and read it lazily."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from safetensors import SafetensorError
from torch import Tensor

from mergekit_arm.errors import InputError, first_line
from mergekit_arm.statistics.files import locate, read_metadata, stored_names, version
from mergekit_arm.statistics.format import WeightRecord
from mergekit_arm.statistics.matching import Matcher
from mergekit_arm.statistics.store import PROBES
from mergekit_arm.statistics.subspace import columns_for_energy, orthonormal

LOG = logging.getLogger(__name__)


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
            self._loader = LazyTensorLoader.from_disk(str(path))
            stored = stored_names(path, self._loader)
            self._probes: Tensor = self._loader.get_tensor(PROBES)
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
            if not any(f"{name}.{key}" in stored for key in ("abs_sum", "basis", "sketch"))
            and not (only_subspaces and site.no_subspace is not None)
        ]
        if absent:
            raise InputError(
                f"activation_stats {reference}: {len(absent)} sites have no tensors, "
                f"first {absent[0]}; copy or measure it again"
            )
        self._names = stored
        self.matcher = Matcher(reference, self.metadata, self._probes)
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self._last = threading.local()

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
        site = self.metadata.sites[record.site]
        tokens = torch.tensor(site.tokens, dtype=torch.float64)
        starved = tokens < max(self.metadata.settings.min_expert_tokens, 1)
        if kind == "mean_abs":
            values = self.tensor(record.site, "abs_sum")
        else:
            values = self.tensor(record.site, "square_sum")
        values = values.double() / tokens.clamp(min=1)[..., None]
        if kind == "rms":
            values = values.sqrt()
        if tokens.ndim:
            values = values.masked_fill(starved[..., None], 0)
            self._warn_starved(record.site, starved)
            if record.row is not None:
                values = values[record.row]
        if not torch.isfinite(values).all():
            raise InputError(
                f"activation_stats {self.reference}: values of {record.site} are not finite; "
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
            subspaces out on purpose (the output head, norms). The last basis of every thread
            is kept, since weights of one site follow each other.

        Raises:
            InputError: subspaces were not measured, or hold less energy than asked for.
        """
        assert record.site is not None
        site = self.metadata.sites[record.site]
        if site.no_subspace is not None:
            return None
        key = (record.site, energy)
        if getattr(self._last, "key", None) != key:
            where = f"activation_stats {self.reference}: {record.site}"
            stored = self.tensor(record.site, "basis")
            if stored.shape[0] != site.width:
                raise InputError(
                    f"{where}: its basis has {stored.shape[0]} rows for {site.width} inputs; "
                    "copy or measure it again"
                )
            count = columns_for_energy(
                self.tensor(record.site, "eigenvalues"),
                float(self.tensor(record.site, "trace")),
                energy,
                measured=self.metadata.settings.energy or 1.0,
                where=where,
            )
            self._last.basis = orthonormal(stored[:, :count], where)
            self._last.key = key
        basis: Tensor = self._last.basis
        return basis

    def tensor(self, site: str, key: str) -> Tensor:
        """Read ``<site>.<key>``.

        Raises:
            InputError: the directory does not hold this statistic.
        """
        full = f"{site}.{key}"
        if full not in self._names:
            measured = ", ".join(self.metadata.settings.statistics)
            raise InputError(
                f"activation_stats {self.reference}: {key} of {site} was not measured "
                f"(it holds: {measured}); calibrate again with --statistics all"
            )
        tensor: Tensor = self._loader.get_tensor(full)
        return tensor

    def holds(self, site: str, key: str) -> bool:
        """Say whether there is a ``<site>.<key>``."""
        return f"{site}.{key}" in self._names

    def stored(self, name: str) -> Tensor:
        """Read a tensor that belongs to no site.

        Raises:
            KeyError: there is none of that name.
        """
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._loader.get_tensor(name)
        return tensor

    def probe(self, record: WeightRecord) -> Tensor:
        """Return the stored probe of a weight, float32."""
        return self._probes[record.probe]


_OPEN: dict[str, tuple[tuple[int, int], Statistics]] = {}
_OPEN_LOCK = threading.Lock()


def open_statistics(reference: str) -> Statistics:
    """Open ``reference`` (a directory, or ``org/name[@revision]`` on the Hub), once.

    Opened statistics are shared; a directory that has been replaced since is opened again.

    Raises:
        InputError: it is neither, or it cannot be read.
    """
    with _OPEN_LOCK:
        path = locate(reference)
        current = version(reference, path)
        opened = _OPEN.get(str(path))
        if opened is None or opened[0] != current:
            opened = _OPEN[str(path)] = (current, Statistics(reference, path))
        return opened[1]
