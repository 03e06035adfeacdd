"""How a model calls its layers: recorded once, replayed for any hidden states."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from mergekit_arm.calibration.inputs.readings import layer_input


class NotWalkable(Exception):
    """The model's forward is no plain chain of layers; the message says in what way."""


class _Hidden:
    """Where the hidden states stand among the arguments."""


@dataclass(frozen=True)
class LayerCall:
    """A layer's arguments, but for the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def fill(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with ``hidden`` in its place."""

        def fill(leaf: Any) -> Any:
            return hidden if leaf is _Hidden else leaf

        return tuple(tree_map(fill, arg) for arg in self.args), {
            name: tree_map(fill, value) for name, value in self.kwargs.items()
        }

    def difference(self, other: LayerCall) -> str | None:
        """Return the name of an argument that differs between two calls, None if none does."""
        ours, theirs = ({**dict(enumerate(c.args)), **c.kwargs} for c in (self, other))
        for name in {**ours, **theirs}:
            if not _equal(ours.get(name), theirs.get(name)):
                return str(name)
        return None


class Recorder:
    """Makes calls; equal tensors of different batches (masks, rotary tables) are held once."""

    def __init__(self) -> None:
        self._pool: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)

    def record(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[LayerCall, Tensor]:
        """Take apart what a layer was handed: the call, and the hidden states.

        Raises:
            NotWalkable: there are no hidden states.
        """
        hidden = layer_input(args, dict(kwargs))
        if hidden is None:
            raise NotWalkable("a layer takes no hidden states")

        def take(leaf: Any) -> Any:
            if leaf is hidden:
                return _Hidden
            return self._shared(leaf) if isinstance(leaf, Tensor) else leaf

        call = LayerCall(
            tuple(tree_map(take, arg) for arg in args),
            {name: tree_map(take, value) for name, value in kwargs.items()},
        )
        return call, hidden

    def _shared(self, tensor: Tensor) -> Tensor:
        known = self._pool[tensor.shape, tensor.dtype]
        for other in known:
            if torch.equal(other, tensor):
                return other
        known.append(tensor)
        return tensor


@dataclass(frozen=True)
class Form:
    """What a layer returns: the hidden states, alone or at a place in a tuple."""

    length: int | None
    """None for a bare tensor."""
    place: int = 0

    @staticmethod
    def of(output: Any, hidden: Tensor) -> Form:
        """Return the form of the ``output`` of a layer that was handed ``hidden``.

        Raises:
            NotWalkable: it holds nothing that could be handed to the next layer.
        """
        if isinstance(output, Tensor) and output.shape == hidden.shape:
            return Form(None)
        if isinstance(output, tuple | list):
            for place, value in enumerate(output):
                if isinstance(value, Tensor) and value.shape == hidden.shape:
                    return Form(len(output), place)
        raise NotWalkable("a layer does not return hidden states of the shape that it takes")

    def wrap(self, hidden: Tensor) -> Any:
        """Return what the model expects of a layer whose hidden states are ``hidden``."""
        if self.length is None:
            return hidden
        return tuple(hidden if i == self.place else None for i in range(self.length))

    def unwrap(self, output: Any) -> Tensor:
        """Return the hidden states in ``output``."""
        found: Tensor = output if self.length is None else output[self.place]
        return found


def _equal(one: Any, other: Any) -> bool:
    """Compare nested arguments; tensors by value, objects without equality by type."""
    (ours, structure), (theirs, other_structure) = tree_flatten(one), tree_flatten(other)
    if structure != other_structure:
        return False
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b):
                return False
        elif type(a) is not type(b) or (_comparable(a) and a != b):
            return False
    return True


def _comparable(value: Any) -> bool:
    return "__eq__" in vars(type(value))
