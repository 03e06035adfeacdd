"""A model's own forward, with something else in the place of every layer.

The model runs as always: embeddings, masks, what follows the layers. Only where it would call a
layer, a function of ours is called instead, which decides what that layer returns. Weights
outside the layers are read when the forward comes to them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mergekit_arm.calibration.inputs.readings import Parameter, ReadingPlan
from mergekit_arm.calibration.layerwise.calls import Form, LayerCall, NotWalkable, Recorder
from mergekit_arm.calibration.layerwise.weights import LayerWeights
from mergekit_arm.errors import first_line
from mergekit_arm.machine import out_of_memory
from mergekit_arm.models.calling import model_arguments

Visit = Callable[[int, LayerCall, Tensor, Callable[..., Any]], Any]
"""Stands in a layer's place: its number, how it is called, with which hidden states, and its own
forward. Returns what the model gets for the layer's output."""


_SAME = 0.01
"""Relative difference of two equal computations, at most: some GPU kernels add in any order."""


class _Recorded(Exception):
    """All calls are recorded; the rest of the forward has no meaning."""


class Chain:
    """The layers of a model without weights, one behind the other."""

    def __init__(self, model: PreTrainedModel, weights: LayerWeights, device: torch.device) -> None:
        """Find the lists of layers in ``model``; which of them is walked, its forward will show.

        Raises:
            NotWalkable: there is none.
        """
        self.model = model
        self.weights = weights
        self.name = ""
        """Of the list of layers, once the forward has reached it."""
        self.form = Form(None)
        """Of the layers' outputs; to be set before layers are stood in for."""
        self.loaded: dict[str, int] = {}
        """Modules outside the layers that were called, and the bytes of their weights."""
        self._device = device
        self._recorder = Recorder()
        self._stacks = _layer_stacks(model)
        self._visit: Visit | None = None
        if not self._stacks:
            raise NotWalkable("it has no list of layers")

    def __len__(self) -> int:
        return len(self._stacks[self.name])

    def layer(self, index: int) -> str:
        """Return the name of a layer."""
        return f"{self.name}.{index}"

    def check_sharing(self, plan: ReadingPlan) -> None:
        """Refuse a model whose layers share weights: their inputs would be seen in one only.

        Raises:
            NotWalkable: it is one.
        """
        layers: dict[nn.Module, set[int]] = defaultdict(set)
        for index in range(len(self)):
            for module in self.model.get_submodule(self.layer(index)).modules():
                layers[module].add(index)
        for parameter in plan.parameters.values():
            places = {index for holder, _ in parameter.holders for index in layers[holder] or {-1}}
            if len(places) > 1:
                raise NotWalkable(f"{parameter.name} belongs to several layers")

    def unlike_first(self, plan: ReadingPlan) -> list[Parameter]:
        """Return the parameters outside the layers, and those that the first layer lacks."""
        found = []
        for name, parameter in plan.parameters.items():
            _, _, own = name.removeprefix(f"{self.name}.").partition(".")
            twin = plan.parameters.get(f"{self.layer(0)}.{own}") if self.holds(name) else None
            if twin is None or twin.tensor.shape != parameter.tensor.shape:
                found.append(parameter)
        return found

    def holds(self, parameter: str) -> bool:
        """Say whether a parameter belongs to one of the layers."""
        return parameter.startswith(f"{self.name}.")

    def called(self) -> set[nn.Module]:
        """Return the modules outside the layers that were called so far."""
        return {self.model.get_submodule(name) for name in self.loaded}

    @contextmanager
    def wired(self) -> Iterator[None]:
        """Take the place of every layer, and read other modules' weights when they are called."""
        for name, buffer in list(self.model.named_buffers()):
            owner, _, own = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[own] = buffer.to(self._device)
        handles = [
            module.register_forward_pre_hook(partial(self._need, name))
            for name, module in _outside(self.model, self._stacks)
        ]
        layers = [
            (stack, index, layer)
            for stack, entries in self._stacks.items()
            for index, layer in enumerate(entries)
        ]
        for stack, index, layer in layers:
            layer.forward = partial(self._reach, stack, index, layer.forward)
        try:
            yield
        finally:
            for _, _, layer in layers:
                del layer.forward
            for handle in handles:
                handle.remove()
            for name in self.loaded:
                self.weights.unload(name, inner=False)

    def run(self, ids: Tensor, visit: Visit) -> None:
        """Pass ``ids`` through the model's forward, with ``visit`` in the place of every layer."""
        embedding = self.model.get_input_embeddings()
        for name, module in self.model.named_modules():
            if module is embedding:
                # Some models bring the ids to the device of its weights before they call it.
                self._need(name, module, ())
        previous, self._visit = self._visit, visit
        try:
            self.model(**model_arguments(self.model, ids.to(self._device), {}))
        finally:
            self._visit = previous

    def record(
        self, ids: Tensor, arrived: Callable[[], None] = lambda: None
    ) -> tuple[list[LayerCall], Tensor]:
        """Return how each layer is called for ``ids``, and the first layer's hidden states.

        ``arrived`` is called at the first layer: from there on nothing is real.

        Raises:
            NotWalkable: layers are not called one after the other on each other's results.
        """
        calls: list[LayerCall] = []
        states: list[Tensor] = []

        def hand_on(index: int, call: LayerCall, hidden: Tensor, _forward: object) -> Any:
            if not calls:
                arrived()
                states.append(hidden)
            self.follows(index, len(calls))
            if hidden is not states[0]:
                raise NotWalkable(f"layer {index} takes more than what the one before it returns")
            calls.append(call)
            if len(calls) == len(self):
                raise _Recorded
            return self.form.wrap(hidden)

        try:
            self.run(ids, hand_on)
        except _Recorded:
            return calls, states[0]
        except NotWalkable:
            raise
        except Exception as error:  # whatever the model's own code raises
            if out_of_memory(error):
                raise
            raise NotWalkable(f"{type(error).__name__}: {first_line(error)}") from error
        raise NotWalkable("not every layer is called")

    def leave(self, ids: Tensor, states: Tensor, passed: Callable[[], None]) -> None:
        """Let what follows the layers work on ``states``, the last layer's output for ``ids``.

        ``passed`` is called at the last layer: before it nothing is real.
        """

        def hand_on(index: int, _call: LayerCall, hidden: Tensor, _forward: object) -> Any:
            if index < len(self) - 1:
                return self.form.wrap(hidden)
            passed()
            return self.form.wrap(states)

        self.run(ids, hand_on)

    def follows(self, index: int, expected: int) -> None:
        """Refuse a forward that calls its layers in another order.

        Raises:
            NotWalkable: it does.
        """
        if index != expected:
            raise NotWalkable("its layers are not called one after the other")

    def check_memory(
        self,
        index: int,
        call: LayerCall,
        hidden: Tensor,
        forward: Callable[..., Any],
        output: Tensor,
    ) -> None:
        """Let ``hidden`` through a layer again, behind all others; before, ``output`` came out.

        Raises:
            NotWalkable: something else comes out, so that layers hand on something out of sight.
        """
        args, kwargs = call.fill(hidden)
        again = self.form.unwrap(forward(*args, **kwargs))
        if float((again - output).float().norm()) > _SAME * float(output.float().norm()):
            raise NotWalkable(f"layer {index} depends on what other layers did")

    def drop_embeddings(self) -> None:
        """Let go of embedding tables; they are read again should one be called."""
        for name in self._embeddings():
            del self.loaded[name]
            self.weights.unload(name, inner=False)

    def blank_embeddings(self) -> None:
        """Put zeros that take no memory in the place of embedding tables.

        For ``leave``, where what comes before the layers has to run and means nothing.
        """
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Embedding) and not self.holds(name):
                self.weights.blank(name)
                self.loaded[name] = 0

    def _embeddings(self) -> list[str]:
        modules = dict(self.model.named_modules())
        return [name for name in self.loaded if isinstance(modules[name], nn.Embedding)]

    def _need(self, name: str, _module: nn.Module, _args: object) -> None:
        if name not in self.loaded:
            self.loaded[name] = self.weights.load(name, inner=False)

    def _reach(
        self, stack: str, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        self.name = self.name or stack
        if stack != self.name:
            raise NotWalkable("its forward passes more than one list of layers")
        assert self._visit is not None
        call, hidden = self._recorder.record(args, kwargs)
        return self._visit(index, call, hidden, forward)


def _layer_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of modules that lie in no other list, by name."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in stacks)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            stacks[name] = module
    return stacks


def _outside(
    model: PreTrainedModel, stacks: dict[str, nn.ModuleList]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules outside the layers that hold weights, but for the output head."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{stack}.") for stack in stacks)
        if not inside and module is not head and list(module.parameters(recurse=False)):
            yield name, module
