"""An independent measurement: every product of a forward pass, recognised by the weight's values.

It shares no idea with the package. It knows no module, no parameter and no name; it runs in
``torch.overrides``, above the operators that the package looks at; and it runs the model as
transformers loads it, with its fused kernels. Given tensors, it says what each was multiplied
with: for every vector of a tensor along one of its axes it looks whether that very vector was
the column of a product's second factor (or the row of its first).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Slot = tuple[str, int, int]
"""A tensor's name, its input axis, and the index along its first axis where it has three."""


@dataclass
class Sums:
    """What one slot was multiplied with."""

    tokens: int = 0
    absolute: Tensor | int = 0
    square: Tensor | int = 0
    vectors: set[int] = field(default_factory=set)


class Recorder(TorchFunctionMode):
    """While active, sum the inputs that each of ``tensors`` is multiplied with."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.products: dict[Slot, Sums] = defaultdict(Sums)
        self.scalings: dict[str, Sums] = defaultdict(Sums)
        self._vectors: dict[bytes, list[tuple[Slot, int]]] = defaultdict(list)
        self._scales: dict[bytes, list[str]] = defaultdict(list)
        self._normalised: dict[int, Tensor] = {}
        self._kept: list[Any] = []
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                continue
            tensor = tensor.detach().float()
            if tensor.ndim in (2, 3):
                for index, matrix in enumerate(tensor if tensor.ndim == 3 else tensor[None]):
                    for axis in (0, 1):
                        slot = (name, axis + tensor.ndim - 2, index)
                        for number, vector in enumerate(matrix.T if axis == 0 else matrix):
                            self._vectors[_key(vector)].append((slot, number))
            if tensor.ndim in (1, 2) and tensor.numel() > 1:
                for scale in (tensor, 1 + tensor):  # Gemma's norms are centred at zero
                    self._scales[_key(scale.flatten())].append(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # Seen before the call: a function may overwrite what it was given.
        if name in ("layer_norm", "rms_norm"):
            weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
            if weight is not None:
                self._scaled(weight, args[0])
        elif name in ("mul", "__mul__", "__rmul__", "mul_"):
            self._scaled(args[0], self._normalised.get(id(args[1])))
            self._scaled(args[1], self._normalised.get(id(args[0])))
        result = func(*args, **kwargs)
        if name == "linear":
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self._multiplied(args[0].reshape(-1, args[0].shape[-1]), weight.T)
        elif name in ("matmul", "__matmul__", "mm", "bmm"):
            self._matmul(args[0], args[1])
        elif name in ("addmm", "baddbmm"):
            self._matmul(args[1], args[2])
        elif name in ("grouped_mm", "_grouped_mm", "grouped_mm_fallback"):
            start = 0
            offsets = kwargs["offs"] if "offs" in kwargs else args[2]
            for expert, end in enumerate(offsets.tolist()):
                self._multiplied(args[0][start:end], args[1][expert])
                start = end
        elif name == "einsum":
            self._einsum(args[0], *args[1:])
        self._follow(name, args, result)
        return result

    def _matmul(self, first: Any, second: Any) -> None:
        if first.ndim < 2 or second.ndim < 2:
            return
        # A stack of matrices against a stack of matrices passes zeros to whom it skips.
        stacked = first.ndim == 3 and second.ndim == 3
        batch = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2])
        left = first.expand(*batch, *first.shape[-2:]).reshape(-1, *first.shape[-2:])
        right = second.expand(*batch, *second.shape[-2:]).reshape(-1, *second.shape[-2:])
        for one, other in zip(left, right, strict=True):
            self._multiplied(one, other, skip_zeros=stacked)
            self._multiplied(other.T, one.T, skip_zeros=stacked)

    def _einsum(self, equation: str, first: Tensor, second: Tensor, *_: Tensor) -> None:
        inputs, output = equation.replace(" ", "").split("->")
        one, other = inputs.split(",")
        summed = [letter for letter in one if letter in other and letter not in output]
        if len(summed) != 1 or second.ndim != 2:
            return
        x = first.movedim(one.index(summed[0]), -1)
        weight = second.movedim(other.index(summed[0]), 0)
        self._multiplied(x.reshape(-1, x.shape[-1]), weight)

    def _multiplied(self, x: Tensor, weight: Tensor, *, skip_zeros: bool = False) -> None:
        """``x`` (tokens × in) was multiplied with ``weight`` (in × out)."""
        found: dict[Slot, set[int]] = defaultdict(set)
        for vector in weight.detach().T.float():
            for slot, number in self._vectors.get(_key(vector), ()):
                found[slot].add(number)
        if not found:
            return
        x = x.detach().double()
        if skip_zeros:
            x = x[x.abs().sum(-1) > 0]
        for slot, vectors in found.items():
            sums = self.products[slot]
            sums.tokens += len(x)
            sums.absolute = sums.absolute + x.abs().sum(0)
            sums.square = sums.square + x.square().sum(0)
            sums.vectors |= vectors

    def _scaled(self, weight: Any, x: Tensor | None) -> None:
        """``weight`` scaled a normalised ``x`` element by element."""
        if x is None or not isinstance(weight, Tensor):
            return
        for name in self._scales.get(_key(weight.detach().float().flatten()), ()):
            rows = x.detach().double().reshape(-1, weight.numel())
            sums = self.scalings[name]
            sums.tokens += len(rows)
            sums.absolute = sums.absolute + rows.abs().sum(0).reshape(self.shapes[name])
            sums.square = sums.square + rows.square().sum(0).reshape(self.shapes[name])

    def _follow(self, name: str, args: Any, result: Any) -> None:
        """Remember what was normalised: ``x / rms(x)`` and ``(x − mean) / std``, and copies."""
        if not isinstance(result, Tensor) or not args or not isinstance(args[0], Tensor):
            return
        source: Tensor | None = None
        if name in ("mul", "__mul__", "__rmul__", "sub", "__sub__", "div", "__truediv__"):
            for one, other in ((args[0], args[1]), (args[1], args[0])):
                if (
                    isinstance(one, Tensor)
                    and isinstance(other, Tensor)
                    and one.ndim == other.ndim > 0
                    and other.shape[-1] == 1 < one.shape[-1]
                ):
                    source = self._normalised.get(id(one), one)
        elif name in ("to", "type", "type_as", "float", "view", "reshape", "contiguous", "half"):
            source = self._normalised.get(id(args[0]))
        if source is not None:
            self._normalised[id(result)] = source
            # While they live, no other tensor has their identity.
            self._kept += [source, result]


def _key(vector: Tensor) -> bytes:
    return vector.contiguous().numpy().tobytes()
