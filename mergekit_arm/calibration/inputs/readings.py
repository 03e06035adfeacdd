"""What each parameter of a model is: multiplied with an input that can be measured, or not.

A *site* is one measured input. Layers that read the same tensor (q/k/v; gate/up) share one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from mergekit_arm.statistics.format import (
    BIAS,
    CONVOLUTION,
    ELEMENTWISE,
    EMBEDDING,
    NEVER_USED,
    ONE_EXPERT,
)

_ELEMENTWISE_NAMES = {"A_log", "time_decay", "time_first"}
"""Decay rates of state-space and linear-attention layers: matrices in shape, not in use."""


@dataclass
class Reading:
    """A parameter, and where its input can be seen."""

    parameter: str
    holder: tuple[nn.Module, str]
    """The module that holds it, and its name there."""
    input_axis: int
    width: int
    matrix: bool
    """True for weights with an output axis, False for norms."""
    experts: int | None = None
    """Rows of statistics of their own: experts of a fused weight, heads of a stacked norm."""
    layers: list[nn.Module] = field(default_factory=list)
    """Layers whose own input it is."""
    users: list[nn.Module] = field(default_factory=list)
    """Modules whose code multiplies it without calling a layer."""
    gated: bool = False
    """A norm that multiplies its input with a gate before it normalises."""

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return what the parameter is applied to in a call of one of ``layers``: (…, in)."""
        tensors = float_arguments(args, kwargs)
        if not tensors:
            return None
        if self.gated and len(tensors) > 1:
            return tensors[0].float() * nn.functional.silu(tensors[1].float())
        return tensors[0]


@dataclass
class SitePlan:
    """One input to measure: all of ``readings`` are applied to it."""

    readings: list[Reading]

    @property
    def width(self) -> int:
        return self.readings[0].width

    @property
    def experts(self) -> int | None:
        return self.readings[0].experts

    @property
    def layers(self) -> list[nn.Module]:
        # Every reading of a site sees the same tensors: observing one is enough.
        return self.readings[0].layers

    @property
    def users(self) -> list[nn.Module]:
        return self.readings[0].users

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return what a call of one of ``layers`` reads: (…, in)."""
        return self.readings[0].inputs(args, kwargs)


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the tensor a layer was called with: its first floating-point argument."""
    return next(iter(float_arguments(args, kwargs)), None)


def float_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the floating-point tensors a layer was called with; the first is its input."""
    return [
        value
        for value in (*args, *kwargs.values())
        if isinstance(value, Tensor) and value.is_floating_point()
    ]


Handed = tuple[Any, ...]
"""What identifies the tensor a layer was handed: its memory and its content."""


@dataclass
class ReadingPlan:
    """What every parameter of a model is: read at an input, listed, or not known yet."""

    parameters: dict[str, Parameter]
    readings: dict[str, Reading] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    """Parameter → why it cannot be measured; before ``discover``, what it will look for."""
    handed: dict[str, tuple[int, tuple[Handed, ...]]] = field(default_factory=dict)
    """Parameter → when it was first read, and what its layers were handed."""

    def discovered(self) -> dict[str, Any]:
        """Return, in JSON, what a forward pass has added: for a run that continues this one."""
        return {
            "readings": {
                name: [reading.input_axis, reading.experts]
                for name, reading in self.readings.items()
                if reading.users and not reading.layers
            },
            "unused": [name for name, reason in self.reasons.items() if reason == NEVER_USED],
        }

    def recall(self, discovered: Mapping[str, Any]) -> None:
        """Take over what an earlier run has discovered."""
        for name, (axis, experts) in discovered["readings"].items():
            parameter = self.parameters[name]
            width = parameter.tensor.shape[axis]
            holder = parameter.holders[0]
            self.readings[name] = Reading(name, holder, axis, width, matrix=True, experts=experts)
            self.unknown.pop(name, None)
            self.reasons.pop(name, None)
        for name in discovered["unused"]:
            self.reasons[name] = NEVER_USED
            self.unknown.pop(name, None)

    def sites(self, parameters: list[str]) -> list[SitePlan]:
        """Group ``parameters`` by the input they share, in the order of the forward pass.

        So ordered, the first bad input that is named is the cause of the others.
        """
        groups: dict[tuple[Any, ...], SitePlan] = {}
        order: dict[tuple[Any, ...], int] = {}
        last = 1 + max((first for first, _ in self.handed.values()), default=0)
        for name in parameters:
            first, handed = self.handed.get(name, (last, ()))
            key = handed or (name,)
            groups.setdefault(key, SitePlan([])).readings.append(self.readings[name])
            order.setdefault(key, first)
        return [groups[key] for key in sorted(groups, key=order.__getitem__)]


def plan_readings(model: nn.Module) -> ReadingPlan:
    """Classify every floating-point parameter by the layers that hold it, as far as that goes.

    What no layer of a known kind holds is ``unknown`` until ``discover`` has seen its use.
    """
    plan = ReadingPlan({parameter.name: parameter for parameter in list_parameters(model)})
    for name, parameter in plan.parameters.items():
        reading = layer_reading(parameter)
        reason = None if reading else listed_reason(parameter)
        if reading:
            plan.readings[name] = reading
        elif reason:
            plan.reasons[name] = reason
        else:
            plan.unknown[name] = f"{type(parameter.holders[0][0]).__name__} holds it"
    return plan


@dataclass
class Parameter:
    """A floating-point parameter with every place that holds it (tied ones have several)."""

    name: str
    tensor: Tensor
    holders: list[tuple[nn.Module, str]] = field(default_factory=list)


def list_parameters(model: nn.Module) -> list[Parameter]:
    """Return every floating-point parameter of ``model`` once, in the model's order."""
    found: dict[int, Parameter] = {}
    for layer_name, layer in model.named_modules():
        for own_name, tensor in layer.named_parameters(recurse=False):
            if tensor.is_floating_point():
                name = f"{layer_name}.{own_name}" if layer_name else own_name
                parameter = found.setdefault(id(tensor), Parameter(name, tensor))
                parameter.holders.append((layer, own_name))
    return list(found.values())


def layer_reading(parameter: Parameter) -> Reading | None:
    """Return how the layers that hold ``parameter`` read it, if they are of a known kind.

    A tied parameter that any layer multiplies with its input is read there, although another
    uses it as an embedding table.
    """
    tensor = parameter.tensor
    reading: Reading | None = None
    for layer, own_name in parameter.holders:
        if own_name != "weight":
            continue
        experts: int | None = None
        if isinstance(layer, nn.Linear):
            axis, matrix = 1, True
            # One of many, like a fused weight's: counted, and left as merged where starved.
            experts = 1 if ONE_EXPERT.match(parameter.name) else None
        elif isinstance(layer, Conv1D):  # GPT-2 stores in × out
            axis, matrix = 0, True
        elif "norm" in type(layer).__name__.lower() and tensor.ndim in (1, 2):
            # Two dimensions: a norm for each head.
            axis, matrix = tensor.ndim - 1, False
            experts = tensor.shape[0] if tensor.ndim == 2 else None
        else:
            continue
        if reading is None:
            width = tensor.shape[axis]
            holder = parameter.holders[0]
            reading = Reading(parameter.name, holder, axis, width, matrix, experts)
        reading.layers.append(layer)
    return reading


def listed_reason(parameter: Parameter) -> str | None:
    """Return why a parameter that no product was seen with has no input to measure.

    None where only a product could explain it: then it must not be listed, but refused.
    """
    for layer, own_name in parameter.holders:
        if isinstance(layer, nn.Embedding) or "embed" in own_name:
            return EMBEDDING
        if isinstance(layer, _ConvNd) and own_name == "weight":
            return CONVOLUTION
        if own_name.endswith("bias"):
            return BIAS
        vector = parameter.tensor.numel() == max(parameter.tensor.shape, default=1)
        if own_name in _ELEMENTWISE_NAMES or (vector and own_name != "weight"):
            return ELEMENTWISE
    return None


def gates_first(layer: nn.Module, x: Tensor, gate: Tensor) -> bool | None:
    """Say whether a gated norm multiplies with silu(gate) before it normalises.

    Found out by experiment: a gate applied afterwards changes only its own channel, one
    applied before changes the norm of them all. None where neither description fits.
    """
    every_other = torch.zeros_like(gate)
    every_other[..., ::2] = 1
    with torch.inference_mode():
        plain = layer.forward(x, gate)
        nudged = layer.forward(x, gate + every_other)
        if torch.equal(plain[..., 1::2], nudged[..., 1::2]):
            return False
        gated = x.float() * nn.functional.silu(gate.float())
        try:
            alone = layer.forward(gated.to(x.dtype))
        except TypeError:
            return None
    close = torch.allclose(plain.float(), alone.float(), rtol=0.05, atol=1e-3)
    return True if close else None
