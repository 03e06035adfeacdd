"""Which measured weight is the one at hand: by its name, and by its values.

A *probe*, a few of a weight's own values, tells whether statistics belong to this model, this
revision and this layer, and finds a layer that slices have given another number.
"""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_arm.errors import InputError
from mergekit_arm.statistics.format import Metadata, WeightRecord
from mergekit_arm.statistics.probe import probe_matches, probe_variants, take_probe


class Matcher:
    """Finds weights among those that were measured. Safe to share between threads."""

    def __init__(self, reference: str, metadata: Metadata, probes: Tensor) -> None:
        """Look among the weights of ``metadata``.

        Args:
            reference: the statistics as the user named them, for messages.
            metadata: what was measured.
            probes: (weights, values) float32, as stored.
        """
        self._reference = reference
        self._metadata = metadata
        self._probes = probes
        self.weights: Mapping[str, WeightRecord] = {**metadata.weights, **metadata.converted}
        """Every tensor that can be found: the checkpoint's and those made from them."""
        self._by_probe: dict[torch.dtype, dict[bytes, list[str]]] = {}
        self._lock = threading.Lock()

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
        name = self._metadata.aliases.get(name, name)
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
        model = self._metadata.model
        measured = model.reference + (f" ({model.revision})" if model.revision else "")
        where = f"{name}: activation_stats {self._reference} were measured on {measured}"
        if candidates:
            role = without_numbers(name).rpartition("#.")[2]
            return (
                f"{where}, where {len(candidates)} weights hold the same values "
                f"({', '.join(candidates[:3])}, …): after slices have renumbered the layers, "
                "nothing tells which of them this one is; leave it out with omega: "
                f"[{{filter: {role}, value: 1.0}}, …] under aim, or rotation: "
                f"[{{filter: {role}, value: 0}}, …] under arm"
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


def without_numbers(name: str) -> str:
    """Return ``name`` without its layer and expert numbers."""
    return re.sub(r"\d+", "#", name)


def _bytes(row: Tensor) -> bytes:
    return (row + 0.0).numpy().tobytes()  # adding zero turns −0 into 0, as torch.equal does
