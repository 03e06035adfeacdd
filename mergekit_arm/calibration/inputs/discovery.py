"""A first, short forward pass that finds out where every weight's input can be seen.

It records which tensor every layer was handed, so that layers which read the same one share a
site, and which modules multiply weights that no layer holds.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mergekit_arm.calibration.inputs.products import Product, ProductMode
from mergekit_arm.calibration.inputs.readings import (
    Handed,
    Reading,
    ReadingPlan,
    float_arguments,
    gates_first,
)
from mergekit_arm.errors import InputError
from mergekit_arm.statistics.format import NEVER_USED

DISCOVERY_TOKENS = 16
"""Enough to see every product; their inputs are all held at once."""


def discover(
    model: nn.Module,
    plan: ReadingPlan,
    forward: Callable[[], None],
    concerned: Callable[[str], bool] = lambda parameter: True,
) -> None:
    """Complete ``plan`` by what ``forward`` does with the parameters of ``model``.

    ``model`` may be a part of the model that was planned, and ``forward`` run only what uses
    the ``concerned`` parameters; the rest of the plan stays as it is.

    Holds the inputs of all layers for the duration of the pass (an address means nothing once
    its tensor is freed), so pass few tokens.

    Raises:
        InputError: an input does not have the weight's width.
    """
    watch = _Watch(model, plan)
    with watch.attached(), torch.inference_mode():
        forward()
    for name in watch.lost:
        plan.readings.pop(name, None)
        plan.reasons.pop(name, None)
        plan.unknown[name] = "it is multiplied in a form that is not understood"
    for name in list(filter(concerned, set(plan.unknown) - watch.lost)):
        holders = [layer for layer, _ in plan.parameters[name].holders]
        if name in plan.readings and plan.readings[name].matrix:
            del plan.unknown[name]
        elif name not in plan.readings and not any(id(layer) in watch.ran for layer in holders):
            del plan.unknown[name]
            plan.reasons[name] = NEVER_USED
        elif name not in plan.readings:
            plan.unknown[name] = f"{type(holders[0]).__name__} uses it in no matrix product"


class _Watch:
    """Hooks and a ``ProductMode`` that fill in a plan's ``readings`` and ``handed``."""

    def __init__(self, model: nn.Module, plan: ReadingPlan) -> None:
        self.ran = {id(model)}
        self.lost: set[str] = set()
        self._model = model
        self._plan = plan
        self._running: list[nn.Module] = []
        self._clock = 0
        self._handed: dict[str, list[Handed]] = defaultdict(list)
        self._kept: list[Tensor] = []
        self._read_by: dict[int, list[Reading]] = defaultdict(list)
        for reading in plan.readings.values():
            for layer in reading.layers:
                self._read_by[id(layer)].append(reading)
        self._held: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)
        for parameter in plan.parameters.values():
            if parameter.tensor.ndim > 1:
                for layer, own_name in parameter.holders:
                    self._held[id(layer)].append((parameter.name, layer, own_name))

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = [
            handle
            for module in self._model.modules()
            for handle in (
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            )
        ]
        try:
            with ProductMode(self._reachable, self._product, self.lost.add):
                yield
        finally:
            for handle in handles:
                handle.remove()
        for name, handed in self._handed.items():
            first = self._plan.handed[name][0]
            self._plan.handed[name] = (first, tuple(handed))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ran.add(id(module))
        self._running.append(module)
        for reading in self._read_by[id(module)]:
            tensors = float_arguments(args, kwargs)
            if not tensors:
                continue
            x = tensors[0]
            width = reading.width
            if x.ndim == 0 or x.shape[-1] != width:
                raise InputError(
                    f"{reading.parameter}: its layer reads an input of shape {tuple(x.shape)}, "
                    f"not of width {width}: this architecture is not supported"
                )
            if not reading.matrix and len(tensors) > 1 and tensors[1].shape == x.shape:
                first = gates_first(module, x, tensors[1])
                if first is None:
                    self._plan.unknown[reading.parameter] = (
                        f"how {type(module).__name__} uses its gate is not understood"
                    )
                reading.gated = bool(first)
            self._note(reading.parameter, self._identity(x, reading))

    def _leave(self, module: nn.Module, _args: Any, _result: Any) -> None:
        self._running.pop()

    def _identity(self, x: Tensor, reading: Reading) -> Handed:
        # The content too: a tensor may have been changed in place between two layers.
        self._kept.append(x)
        content = x.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        return (x.data_ptr(), reading.width, reading.experts, reading.gated, digest)

    def _note(self, name: str, handed: Handed) -> None:
        self._clock += 1
        self._plan.handed.setdefault(name, (self._clock, ()))
        self._handed[name].append(handed)

    def _reachable(self) -> Iterator[tuple[str, Tensor]]:
        """Matrices of the innermost running module and of those inside it that do not run."""
        module = self._running[-1] if self._running else self._model
        if isinstance(module, (nn.Linear, Conv1D)):
            return
        for inner in module.modules():
            for name, holder, own_name in self._held[id(inner)]:
                tensor = holder._parameters[own_name]
                if tensor is not None:
                    yield name, tensor

    def _product(self, product: Product) -> None:
        user = self._running[-1] if self._running else self._model
        tensor = self._plan.parameters[product.parameter].tensor
        self._plan.reasons.pop(product.parameter, None)  # an embedding table, multiplied after all
        reading = self._plan.readings.setdefault(
            product.parameter,
            Reading(
                product.parameter,
                self._plan.parameters[product.parameter].holders[0],
                product.input_axis,
                tensor.shape[product.input_axis],
                matrix=True,
                experts=tensor.shape[0] if tensor.ndim == 3 else None,
            ),
        )
        if reading.input_axis != product.input_axis:
            self.lost.add(product.parameter)
        if not any(known is user for known in reading.users):
            reading.users.append(user)
        self._note(product.parameter, ("product", product.parameter))
