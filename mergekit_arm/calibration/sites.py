"""Which inputs are measured: the layers that read each weight, and the sites they share.

A *site* is one measured input. Layers that read the same tensor (q/k/v; gate/up) share one:
a first, short forward pass records which tensor every layer was handed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mergekit_arm.errors import InputError
from mergekit_arm.statistics.format import BIAS, EMBEDDING


@dataclass
class Reading:
    """A parameter and the layers whose input it is multiplied with."""

    parameter: str
    input_axis: int
    width: int
    matrix: bool
    """True for weights with an output axis, False for one-dimensional norm weights."""
    layers: list[nn.Module] = field(default_factory=list)


@dataclass
class SitePlan:
    """One input to measure: all of ``readings`` multiply it."""

    readings: list[Reading]

    @property
    def width(self) -> int:
        return self.readings[0].width

    @property
    def layers(self) -> list[nn.Module]:
        # Every reading of a site sees the same tensors: observing one is enough.
        return self.readings[0].layers


@dataclass(frozen=True)
class ReadingPlan:
    """What every parameter of a model is: read at an input, listed, or unknown to us."""

    readings: dict[str, Reading]
    reasons: dict[str, str]
    unknown: dict[str, str]
    """Parameter → the class of the layer that holds it."""


def plan_readings(model: nn.Module) -> ReadingPlan:
    """Classify every floating-point parameter of ``model`` by the layer that holds it.

    A tied parameter that any layer multiplies with its input is read there, although another
    uses it as an embedding table.
    """
    names: dict[int, str] = {}
    readings: dict[str, Reading] = {}
    reasons: dict[str, str] = {}
    unknown: dict[str, str] = {}
    for layer_name, layer in model.named_modules():
        for own_name, parameter in layer.named_parameters(recurse=False):
            if not parameter.is_floating_point():
                continue
            name = f"{layer_name}.{own_name}" if layer_name else own_name
            name = names.setdefault(id(parameter), name)
            axis = _input_axis(layer, own_name, parameter)
            if axis is not None:
                reading = readings.setdefault(
                    name, Reading(name, axis, parameter.shape[axis], parameter.ndim > 1)
                )
                reading.layers.append(layer)
            elif isinstance(layer, nn.Embedding):
                reasons[name] = EMBEDDING
            elif own_name.endswith("bias") and parameter.ndim == 1:
                reasons[name] = BIAS
            else:
                unknown[name] = type(layer).__name__
    for name in readings:
        reasons.pop(name, None)
        unknown.pop(name, None)
    return ReadingPlan(readings, reasons, unknown)


def _input_axis(layer: nn.Module, own_name: str, parameter: Tensor) -> int | None:
    if own_name != "weight":
        return None
    if isinstance(layer, nn.Linear):
        return 1
    if isinstance(layer, Conv1D):  # GPT-2 stores in × out
        return 0
    if parameter.ndim == 1 and "norm" in type(layer).__name__.lower():
        return 0
    return None


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the tensor a layer was called with: its first floating-point argument."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def share_sites(readings: dict[str, Reading], forward: Callable[[], None]) -> list[SitePlan]:
    """Group ``readings`` that are handed the very same tensors during ``forward``.

    Layers that ``forward`` does not reach get a site each. Holds the inputs of all layers for
    the duration of the pass (identity means nothing once a tensor is freed), so pass few
    tokens.

    Raises:
        InputError: an input does not have the weight's width.
    """
    handed: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    clock = 0

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal clock
        x = layer_input(args, kwargs)
        if x is not None:
            clock += 1
            handed[id(layer)].append((clock, x))

    layers = {id(layer): layer for reading in readings.values() for layer in reading.layers}
    handles = [
        layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers.values()
    ]
    try:
        with torch.inference_mode():
            forward()
    finally:
        for handle in handles:
            handle.remove()

    groups: dict[tuple[Any, ...], SitePlan] = {}
    order: dict[tuple[Any, ...], int] = {}
    unreached = clock + 1
    for reading in readings.values():
        calls = sorted(
            (call for layer in reading.layers for call in handed[id(layer)]),
            key=lambda call: call[0],
        )
        for _, x in calls:
            if x.ndim == 0 or x.shape[-1] != reading.width:
                raise InputError(
                    f"{reading.parameter}: its layer reads an input of shape {tuple(x.shape)}, "
                    f"not of width {reading.width}: this architecture is not supported"
                )
        key = tuple(id(x) for _, x in calls) or (reading.parameter,)
        groups.setdefault(key, SitePlan([])).readings.append(reading)
        order.setdefault(key, calls[0][0] if calls else unreached)
    # In the order of the forward pass, so that the first bad input that is named is the cause.
    return [groups[key] for key in sorted(groups, key=order.__getitem__)]
