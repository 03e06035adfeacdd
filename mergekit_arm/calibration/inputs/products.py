"""See every product of an input with a weight, however a module's code spells it.

Layers are measured by their input. Fused experts, routers and state-space mixers hold weights
that no layer multiplies: their own code slices, transposes and multiplies them. There the
products themselves are observed, below Python's ``@``, ``einsum`` and ``F.linear``, where few
operators remain; a weight is recognised by the memory that an operand is a view of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

# Operator → where its two factors stand among the arguments.
_FACTORS = {
    "aten::mm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::bmm": (0, 1),
    "aten::baddbmm": (1, 2),
    "aten::mv": (0, 1),
    "aten::addmv": (1, 2),
    "aten::_grouped_mm": (0, 1),
}
_COPIES = ("aten::_to_copy", "aten::clone")


@dataclass(frozen=True)
class Product:
    """One product of inputs with a weight, or with one expert's slice of a fused weight."""

    parameter: str
    input_axis: int
    """The parameter's axis that was summed over."""
    expert: int | None
    """Index along the first axis of a weight with three; None where all of a weight is used."""
    x: Tensor
    """(tokens, in)"""


@dataclass(frozen=True)
class _Memory:
    """A parameter, or a copy of a part of one in another dtype or layout."""

    tensor: Tensor
    parameter: str
    axes: tuple[int | None, ...]
    """The parameter's axis that each axis of ``tensor`` runs along."""
    rank: int
    """Axes of the parameter."""
    expert: int | None = None


@dataclass(frozen=True)
class _View:
    parameter: str
    axes: tuple[int | None, ...]
    whole: tuple[bool, ...]
    """Whether each axis covers all of the parameter's."""
    rank: int
    expert: int | None


class ProductMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch is
    """While active, hand every product with one of ``parameters`` to ``observe``.

    Args:
        parameters: names and tensors to look for; asked again at every product, because
            weights that are kept elsewhere have another address at every call.
        observe: receives each product.
        lost: receives the name of a parameter that was multiplied in a form not understood.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[tuple[str, Tensor]]],
        observe: Callable[[Product], None],
        lost: Callable[[str], None],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch is
        self._parameters = parameters
        self._observe = observe
        self._lost = lost
        self._copies: list[_Memory] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # In inference mode matmul, linear and einsum arrive whole; taken apart they are the
        # operators above.
        if func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        name = func._schema.name
        if name in _FACTORS:
            first, second = (args[i] for i in _FACTORS[name])
            offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)
            self._look(first, second, offsets if name == "aten::_grouped_mm" else None)
        elif name in _COPIES and args[0].ndim > 1:
            self._follow(args[0], result)
        return result

    def _look(self, first: Tensor, second: Tensor, offsets: Tensor | None) -> None:
        for weight, other, contracted, x in (
            (second, first, max(second.ndim - 2, 0), first),
            (first, second, first.ndim - 1, second.mT if second.ndim > 1 else second),
        ):
            memory = self._find(weight)
            if memory is None:
                continue
            view = _view(weight, memory)
            axis = view.axes[contracted] if view else None
            if view is None or axis is None or not view.whole[contracted] or other.numel() == 0:
                if other.numel():
                    self._lost(memory.parameter)
                continue
            for expert, rows in _split(view, x, offsets):
                self._observe(Product(view.parameter, axis, expert, rows))

    def _follow(self, source: Tensor, copy: Tensor) -> None:
        memory = self._find(source)
        view = _view(source, memory) if memory else None
        if view and all(view.whole):
            self._copies.append(_Memory(copy, view.parameter, view.axes, view.rank, view.expert))

    def _find(self, tensor: Tensor) -> _Memory | None:
        address = tensor.untyped_storage().data_ptr()
        if address == 0:
            return None
        for memory in self._copies:
            if memory.tensor.untyped_storage().data_ptr() == address:
                return memory
        for name, parameter in self._parameters():
            if parameter.untyped_storage().data_ptr() == address:
                start = tensor.storage_offset() - parameter.storage_offset()
                if 0 <= start < parameter.numel():
                    axes = tuple(range(parameter.ndim))
                    return _Memory(parameter, name, axes, parameter.ndim)
        return None


def _view(tensor: Tensor, memory: _Memory) -> _View | None:
    """Say which axes of the parameter a tensor in its memory runs along, by their strides."""
    whole_shape, strides = memory.tensor.shape, memory.tensor.stride()
    axes: list[int | None] = []
    whole: list[bool] = []
    sources: set[int] = set()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size == 1 or stride == 0:
            axes.append(None)
            whole.append(True)
            continue
        source = next(
            (
                i
                for i, (full, step) in enumerate(zip(whole_shape, strides, strict=True))
                if step == stride and full >= size and full > 1
            ),
            None,
        )
        if source is None:
            return None
        sources.add(source)
        axes.append(memory.axes[source])
        whole.append(size == whole_shape[source])
    expert = memory.expert
    for source, axis in enumerate(memory.axes):
        if axis == 0 and memory.rank == 3 and source not in sources:
            offset = tensor.storage_offset() - memory.tensor.storage_offset()
            expert = offset // strides[source]
    return _View(memory.parameter, tuple(axes), tuple(whole), memory.rank, expert)


def _split(view: _View, x: Tensor, offsets: Tensor | None) -> Iterator[tuple[int | None, Tensor]]:
    """Yield each expert that took part and its rows: (tokens, in)."""
    many = view.rank == 3 and view.expert is None
    if not many:
        yield view.expert, x.reshape(-1, x.shape[-1])
    elif offsets is not None:
        start = 0
        for expert, end in enumerate(offsets.tolist()):
            if end > start:
                yield expert, x[start:end]
            start = end
    else:
        for expert, rows in enumerate(x):
            # Dense formulations pass every token to every expert, zeroed where it is not
            # routed there.
            yield expert, rows[rows.any(-1)]
