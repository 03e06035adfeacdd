"""Open a statistics directory, local or on the Hub, and read it lazily."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub.errors
import pydantic
import torch
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from safetensors import SafetensorError
from torch import Tensor

from mergekit_arm.errors import InputError, first_line
from mergekit_arm.statistics.format import FORMAT_VERSION, METADATA_FILE, Metadata, WeightRecord
from mergekit_arm.statistics.probe import probe_matches, probe_variants, take_probe
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
        self.metadata = _read_metadata(reference, path)
        try:
            self._loader = LazyTensorLoader.from_disk(str(path))
            stored = _stored_names(path, self._loader)
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
        self.weights: Mapping[str, WeightRecord] = {
            **self.metadata.weights,
            **self.metadata.converted,
        }
        """Every tensor that can be found: the checkpoint's and those made from them."""
        names = {*self.weights, *self.metadata.aliases}
        self.roles = Counter(without_numbers(name) for name in names)
        """How many tensors a merge may ask for whose names differ in their numbers only."""
        self._by_probe: dict[torch.dtype, dict[bytes, list[str]]] = {}
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self._last = threading.local()

    def find(
        self, name: str, tensor: Tensor, *, permuted: bool = False, renumbered: bool = False
    ) -> tuple[str, WeightRecord]:
        """Return the name and record of the measured weight that ``tensor`` holds.

        The name decides where name and probe agree. Where they do not, as after ``slices``
        have shifted layer numbers, the probe finds the weight under the name it was measured
        by.

        Args:
            name: of the output tensor.
            tensor: the model's own, in any dtype.
            permuted: it has a vocabulary axis that mergekit may have reordered; then the name
                alone decides.
            renumbered: slices may have given layers other numbers; then a name does not tell
                apart weights that hold the same values in several layers.

        Raises:
            InputError: no measured weight fits; the message says why.
        """
        weights = self.weights
        name = self.metadata.aliases.get(name, name)
        record = weights.get(name)
        if permuted:
            return self._find_permuted(name, tensor)
        shape = list(tensor.shape)
        named = (
            record is not None
            and record.shape == shape
            and probe_matches(self._probes[record.probe], tensor)
        )
        if record and named and not renumbered:
            return name, record
        candidates = [
            other for other in self._with_probe_of(tensor) if weights[other].shape == shape
        ]
        role = without_numbers(name)
        alike = [other for other in candidates if without_numbers(other) == role] or candidates
        if len({(weights[other].site, weights[other].row) for other in alike}) == 1:
            return (name, record) if record and named else (alike[0], weights[alike[0]])
        raise InputError(self._mismatch(name, tensor, record, alike))

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

    def _find_permuted(self, name: str, tensor: Tensor) -> tuple[str, WeightRecord]:
        weights = self.weights
        alike = [
            other
            for other in weights
            if other == name or other.endswith(f".{name}") or name.endswith(f".{other}")
        ]
        known = name if name in weights else alike[0] if len(alike) == 1 else None
        if known is None:
            raise InputError(self._mismatch(name, tensor, None, []))
        record = weights[known]
        axis = record.input_axis
        if axis is not None and (
            tensor.ndim != len(record.shape) or tensor.shape[axis] != record.shape[axis]
        ):
            raise InputError(self._mismatch(name, tensor, record, []))
        return known, record

    def _with_probe_of(self, tensor: Tensor) -> list[str]:
        with self._lock:
            index = self._by_probe.get(tensor.dtype)
            if index is None:
                index = self._by_probe[tensor.dtype] = self._probe_index(tensor.dtype)
        return index.get(_bytes(take_probe(tensor)), [])

    def _probe_index(self, dtype: torch.dtype) -> dict[bytes, list[str]]:
        index: dict[bytes, list[str]] = defaultdict(list)
        for variant in probe_variants(self._probes, dtype):
            rows = [_bytes(row) for row in variant]
            for name, record in self.weights.items():
                if name not in index[rows[record.probe]]:
                    index[rows[record.probe]].append(name)
        return dict(index)

    def _mismatch(
        self, name: str, tensor: Tensor, record: WeightRecord | None, candidates: list[str]
    ) -> str:
        model = self.metadata.model
        measured = model.reference + (f" ({model.revision})" if model.revision else "")
        where = f"{name}: activation_stats {self.reference} were measured on {measured}"
        if candidates:
            return (
                f"{where}, where {len(candidates)} weights hold the same values "
                f"({', '.join(candidates[:3])}, …): after slices have renumbered the layers, "
                "nothing tells which of them this one is; leave it as merged with omega: "
                f"[{{filter: {without_numbers(name).rpartition('#.')[2]}, value: 1.0}}, …]"
            )
        if record is None:
            return f"{where}, which has no such weight: is the base_model the measured model?"
        if record.shape != list(tensor.shape):
            return (
                f"{where}, where it has shape {record.shape}; base_model's has "
                f"{list(tensor.shape)}: use statistics of this base_model"
            )
        return (
            f"{where}, whose values differ from base_model's: another model or revision. "
            "Set base_model to the measured one, or calibrate this one"
        )


_OPEN: dict[str, tuple[tuple[int, int], Statistics]] = {}
_OPEN_LOCK = threading.Lock()


def open_statistics(reference: str) -> Statistics:
    """Open ``reference`` (a directory, or ``org/name[@revision]`` on the Hub), once.

    Opened statistics are shared; a directory that has been replaced since is opened again.

    Raises:
        InputError: it is neither, or it cannot be read.
    """
    with _OPEN_LOCK:
        path = _local_path(reference)
        stat = _stat(reference, path / METADATA_FILE)
        version = (stat.st_mtime_ns, stat.st_ino)
        opened = _OPEN.get(str(path))
        if opened is None or opened[0] != version:
            opened = _OPEN[str(path)] = (version, Statistics(reference, path))
        return opened[1]


def _local_path(reference: str) -> Path:
    if os.path.isdir(reference):
        return Path(reference).resolve()
    if reference.startswith((".", "/", "~")) or reference.count("/") != 1:
        raise InputError(
            f"activation_stats {reference}: no such directory; "
            "`mergekit-arm calibrate MODEL DIRECTORY` writes one"
        )
    try:
        return Path(_hub_path(reference))
    except (OSError, huggingface_hub.errors.HFValidationError) as error:
        raise InputError(
            f"activation_stats {reference}: neither a directory here nor readable on the Hub "
            f"({first_line(error)})"
        ) from error


def _hub_path(reference: str) -> str:
    # mergekit's own download lists the repository first, which fails without a network even
    # where everything is cached.
    model = ModelReference.parse(reference).model
    return huggingface_hub.snapshot_download(
        model.path,
        revision=model.revision,
        cache_dir=LoaderCache().hf_cache_dir,
        allow_patterns=["*.json", "*.safetensors", "README.md"],
    )


def _stat(reference: str, file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise InputError(
            f"activation_stats {reference}: no {METADATA_FILE} in it, so it is no statistics "
            "directory; `mergekit-arm calibrate` writes one"
        ) from error


def _read_metadata(reference: str, path: Path) -> Metadata:
    _stat(reference, path / METADATA_FILE)
    try:
        text = (path / METADATA_FILE).read_text(encoding="utf-8")
        found = re.search(r'"format_version":\s*(\d+)', text)
        if found and int(found.group(1)) > FORMAT_VERSION:
            raise InputError(
                f"activation_stats {reference}: format {found.group(1)} is newer than this "
                f"mergekit-arm reads ({FORMAT_VERSION}): pip install -U mergekit-arm"
            )
        return Metadata.model_validate_json(text)
    except (OSError, UnicodeDecodeError, pydantic.ValidationError) as error:
        detail = (
            f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}"
            if isinstance(error, pydantic.ValidationError)
            else first_line(error)
        )
        raise InputError(
            f"activation_stats {reference}: {METADATA_FILE} is damaged ({detail}); "
            "copy or measure it again"
        ) from error


def _stored_names(path: Path, loader: LazyTensorLoader) -> frozenset[str]:
    # Opening a shard checks that the file is as long as its header says.
    names: list[str] = []
    for shard in loader.index.shards:
        one = LazyTensorLoader.from_disk(str(path)) if len(loader.index.shards) > 1 else loader
        one.get_tensor(shard.contained_keys[0])
        names.extend(shard.contained_keys)
    return frozenset(names)


def without_numbers(name: str) -> str:
    """Return ``name`` without its layer and expert numbers."""
    return re.sub(r"\d+", "#", name)


def _bytes(row: Tensor) -> bytes:
    return (row + 0.0).numpy().tobytes()  # adding zero turns −0 into 0, as torch.equal does
