"""Coverage: every floating-point tensor of a checkpoint is measured, or listed with a reason."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_arm.calibration.names import map_checkpoint
from mergekit_arm.calibration.sites import Reading, ReadingPlan
from mergekit_arm.errors import InputError
from mergekit_arm.statistics.format import NOT_LOADED
from mergekit_arm.statistics.probe import take_probe


@dataclass(frozen=True)
class CoveredWeight:
    """A checkpoint tensor: read by ``parameter``'s layers, or listed with ``reason``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameter: str | None
    reason: str | None


@dataclass(frozen=True)
class Coverage:
    """All floating-point tensors of a checkpoint, in name order, and their probes."""

    weights: list[CoveredWeight]
    probes: Tensor
    """(weights, PROBE_SIZE) float32."""
    readings: Mapping[str, Reading]

    @property
    def read_parameters(self) -> list[str]:
        """Parameters to measure, in the model's order: those a checkpoint tensor went into."""
        wanted = {weight.parameter for weight in self.weights if weight.reason is None}
        return [name for name in self.readings if name in wanted]

    def content_hash(self) -> str:
        """Return a hash over names, shapes, dtypes and probes; independent of sharding."""
        digest = hashlib.sha256()
        for weight, probe in zip(self.weights, self.probes, strict=True):
            digest.update(f"{weight.name} {list(weight.shape)} {weight.dtype} ".encode())
            digest.update(probe.numpy().tobytes())
        return digest.hexdigest()


def cover_checkpoint(
    model: PreTrainedModel, checkpoint: LazyTensorLoader, plan: ReadingPlan
) -> Coverage:
    """Assign every floating-point tensor of ``checkpoint`` to a reading or a reason.

    Reads probes only.

    Raises:
        InputError: a tensor is neither: this architecture cannot be measured in full, and
            statistics that silently lack weights would be worse than none.
    """
    first_name = {id(p): name for name, p in model.named_parameters()}
    canonical = {
        alias: first_name[id(p)] for alias, p in model.named_parameters(remove_duplicate=False)
    }
    weights: list[CoveredWeight] = []
    probes: list[Tensor] = []
    unmeasurable: list[str] = []
    for entry in map_checkpoint(model, sorted(checkpoint.index.tensor_paths)):
        tensor = checkpoint.get_tensor(entry.name)
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        parameter = canonical.get(entry.parameter) if entry.parameter else None
        reason = None
        if parameter is None:
            reason = NOT_LOADED
        elif parameter in plan.reasons:
            reason = plan.reasons[parameter]
        elif parameter not in plan.readings or entry.converted:
            held_by = plan.unknown.get(parameter, "a layer that transformers fuses")
            unmeasurable.append(f"{entry.name} ({held_by})")
        weights.append(
            CoveredWeight(entry.name, tuple(tensor.shape), _dtype(tensor.dtype), parameter, reason)
        )
        probes.append(take_probe(tensor))
    if unmeasurable:
        raise InputError(
            f"{type(model).__name__} has {len(unmeasurable)} weights that cannot be measured yet, "
            f"first {unmeasurable[0]}; statistics without them would be incomplete"
        )
    return Coverage(weights, torch.stack(probes), plan.readings)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
