"""Coverage: every tensor of a checkpoint is measured, or listed with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_arm.calibration.inputs.readings import Reading, ReadingPlan
from mergekit_arm.errors import InputError
from mergekit_arm.models.conversion import Part, trace_parts
from mergekit_arm.models.tensors import CheckpointTensors, dtype_name
from mergekit_arm.statistics.format import BIAS, BUFFER, NOT_FLOATING, NOT_LOADED
from mergekit_arm.statistics.probe import content_hash, take_probe


@dataclass
class CoveredWeight:
    """A tensor that a merge may ask for: read at an input, or listed with ``reason``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]
    """The parameters it went into."""
    reason: str | None = None
    input_axis: int | None = None
    """The tensor's own axis of inputs; known once the coverage is settled."""
    row: int | None = None
    """Row of the site's statistics: one expert of many."""


@dataclass
class Coverage:
    """All tensors of a checkpoint, in name order, and their probes."""

    architecture: str
    plan: ReadingPlan
    weights: list[CoveredWeight] = field(default_factory=list)
    converted: list[CoveredWeight] = field(default_factory=list)
    """Tensors that transformers and mergekit make from several of ``weights``."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Other names that a merge may use for one of the above."""
    taken: list[Tensor] = field(default_factory=list)
    """Probes of ``weights``, then of ``converted``."""

    @property
    def readings(self) -> Mapping[str, Reading]:
        return self.plan.readings

    @property
    def probes(self) -> Tensor:
        """(tensors, PROBE_SIZE) float32."""
        return torch.stack(self.taken)

    @property
    def read_parameters(self) -> list[str]:
        """Parameters to measure, in the model's order: those a checkpoint tensor went into."""
        wanted = {p.parameter for w in self.weights if w.reason is None for p in w.parts}
        return [name for name in self.readings if name in wanted]

    def content_hash(self) -> str:
        """Return a hash over names, shapes, dtypes and probes; independent of sharding."""
        probed = zip(self.weights, self.taken, strict=False)
        return content_hash((one.name, one.shape, one.dtype, probe) for one, probe in probed)

    def settle(self) -> None:
        """Give every tensor its input axis or its reason, now that the plan is complete.

        Raises:
            InputError: a tensor has neither: this architecture cannot be measured in full, and
                statistics that silently lack weights would be worse than none.
        """
        unmeasurable = []
        for weight in (*self.weights, *self.converted):
            trouble = _settle(weight, self.plan) if weight.reason is None else None
            if trouble:
                unmeasurable.append(f"{weight.name} ({trouble})")
        if unmeasurable:
            raise InputError(
                f"{self.architecture} has {len(unmeasurable)} weights that cannot be measured, "
                f"first {unmeasurable[0]}; statistics without them would be incomplete"
            )


def cover_checkpoint(
    model: PreTrainedModel, checkpoint: CheckpointTensors, plan: ReadingPlan
) -> Coverage:
    """Find the parameters that every tensor of ``checkpoint`` went into.

    Integer and boolean tensors too: mergekit casts them where a merge sets ``dtype``. Reads
    probes only.

    Raises:
        InputError: a tensor has another shape than its parameter.
    """
    first_name = {id(p): name for name, p in model.named_parameters()}
    canonical = {
        alias: first_name[id(p)] for alias, p in model.named_parameters(remove_duplicate=False)
    }
    buffers = {name for name, _ in model.named_buffers()}
    coverage = Coverage(type(model).__name__, plan)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in checkpoint.names:
        tensor = checkpoint.get(name)
        shapes[name] = tuple(tensor.shape)
        if tensor.numel():
            weight = CoveredWeight(name, shapes[name], dtype_name(tensor.dtype), ())
            weight.reason = None if tensor.is_floating_point() else NOT_FLOATING
            coverage.weights.append(weight)
            coverage.taken.append(take_probe(tensor))
    parts = trace_parts(model, shapes)
    _check_shapes(model, coverage, parts)
    for weight in coverage.weights:
        weight.parts = tuple(
            replace(part, parameter=canonical.get(part.parameter, part.parameter))
            for part in parts[weight.name]
        )
        if weight.reason is None and not weight.parts:
            weight.reason = NOT_LOADED
        if weight.reason is None and weight.parts[0].parameter in buffers:
            weight.reason = BIAS if weight.parts[0].parameter.endswith("bias") else BUFFER
    return coverage


def _check_shapes(
    model: PreTrainedModel, coverage: Coverage, parts: Mapping[str, tuple[Part, ...]]
) -> None:
    wanted = {name: tuple(one.shape) for name, one in model.state_dict(keep_vars=True).items()}
    for weight in coverage.weights:
        for part in parts[weight.name]:
            shape = wanted.get(part.parameter, weight.shape)
            if not part.converted and shape != weight.shape:
                raise InputError(
                    f"{weight.name} of {model.name_or_path or coverage.architecture} has shape "
                    f"{list(weight.shape)}, and config.json asks for {list(shape)}; "
                    "copy or download both again"
                )


def _settle(weight: CoveredWeight, plan: ReadingPlan) -> str | None:
    """Give ``weight`` its input axis or its reason; return what prevents it."""
    names = [part.parameter for part in weight.parts]
    trouble = next((plan.unknown[name] for name in names if name in plan.unknown), None)
    if trouble:
        return trouble
    if all(name in plan.readings for name in names):
        found = {_place(part, plan.readings[part.parameter]) for part in weight.parts}
        weight.input_axis, weight.row = found.pop()
        if found or weight.input_axis is None:
            return "transformers fuses it with others along its inputs"
        return None
    reasons = {plan.reasons.get(name) for name in names}
    weight.reason = reasons.pop()
    if reasons or weight.reason is None:
        return "it is no parameter that a layer reads"
    return None


def _place(part: Part, reading: Reading) -> tuple[int | None, int | None]:
    """Return a tensor's input axis and its row of the reading's statistics."""
    row = part.expert
    if reading.experts == 1 and reading.matrix and row is None and len(part.axes) == 2:
        row = 0
    return part.axes[reading.input_axis], row
