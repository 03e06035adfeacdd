"""What transformers' loading does to a tensor: which parameters it becomes, and along which axes.

transformers fuses, splits and turns tensors while it loads them. What its operations do to
coordinates tells where an input axis goes, without knowing the operations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from mergekit_arm.errors import Failure, first_line
from mergekit_arm.models.names import map_checkpoint


@dataclass(frozen=True)
class Part:
    """What one parameter received from a tensor of the checkpoint."""

    parameter: str
    axes: tuple[int | None, ...]
    """Per axis of the parameter: the tensor's axis that runs along it in full and in order."""
    expert: int | None = None
    """Index along the parameter's first axis, where the tensor became one slice of it."""
    converted: bool = False
    """Fused, split or turned, not only renamed."""


def trace_parts(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Part, ...]]:
    """Return what became of every tensor of the checkpoint; nothing of those not loaded.

    Args:
        model: the loaded model.
        shapes: name → shape of every tensor of the checkpoint.

    Raises:
        Failure: one of transformers' conversions cannot be followed.
    """
    found: dict[str, tuple[Part, ...]] = {}
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    converters: dict[str, WeightConverter] = {}
    for entry in map_checkpoint(model, list(shapes)):
        if entry.parameter is None:
            found[entry.name] = ()
        elif entry.converter is None:
            axes = tuple(range(len(shapes[entry.name])))
            found[entry.name] = (Part(entry.parameter, axes),)
        else:
            groups[entry.parameter][entry.pattern].append(entry.name)
            converters[entry.parameter] = entry.converter
    traces: dict[tuple[object, ...], _Trace] = {}
    for target, sources in groups.items():
        converter = converters[target]
        alike = tuple((p, len(names), shapes[names[0]]) for p, names in sources.items())
        signature = (id(converter), alike)
        if signature not in traces:
            traces[signature] = _trace(model, converter, target, sources, shapes)
        first = converter.target_patterns[0]
        for pattern, names in sources.items():
            for number, name in enumerate(names):
                found[name] = tuple(
                    Part(target.replace(first, suffix), axes, number if stacked else None, True)
                    for suffix, axes, stacked in traces[signature][pattern]
                )
    return found


_Trace = dict[str, list[tuple[str, tuple[int | None, ...], bool]]]
"""Source pattern → for every parameter it reaches: target pattern, axes, stacked or not."""


def _trace(
    model: PreTrainedModel,
    converter: WeightConverter,
    target: str,
    sources: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> _Trace:
    """Find out what a conversion does by converting coordinates instead of weights.

    A tensor that holds its own index along one axis shows afterwards where that axis went. Two
    tensors of a list of experts tell the same as all of them.
    """
    first = converter.target_patterns[0]
    few = {p: names[:2] for p, names in sources.items()}
    number = {p: i for i, p in enumerate(few)}

    def convert(code: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
        fresh = deepcopy(converter)
        for pattern, tensors in code.items():
            for name, tensor in zip(few[pattern], tensors, strict=True):
                fresh.add_tensor(target, name, pattern, tensor)
        try:
            made = fresh.convert(target, model=model, config=model.config)
        except Exception as error:  # transformers' operations raise whatever they meet
            raise Failure(
                f"{target}: its conversion cannot be followed: {first_line(error)}"
            ) from error
        return {k: v[0] if isinstance(v, list) else v for k, v in made.items()}

    # Which source every element comes from, then its index along each of the source's axes.
    origin = convert(
        {
            pattern: [
                _filled(shapes[name], 2 * number[pattern] + i) for i, name in enumerate(names)
            ]
            for pattern, names in few.items()
        }
    )
    masks = {
        (pattern, suffix): origin[parameter] == 2 * number[pattern]
        for pattern in few
        for suffix in converter.target_patterns
        if (parameter := target.replace(first, suffix)) in origin
    }
    del origin
    axes: dict[tuple[str, str], list[int | None]] = {
        key: [None] * mask.ndim for key, mask in masks.items()
    }
    for source in range(max(len(shapes[names[0]]) for names in few.values())):
        made = convert({p: [_index(shapes[n], source) for n in names] for p, names in few.items()})
        for (pattern, suffix), mask in masks.items():
            shape = shapes[few[pattern][0]]
            for axis, size in enumerate(mask.shape):
                if source < len(shape) and shape[source] == size:
                    index = made[target.replace(first, suffix)]
                    if _runs_along(index, mask, axis):
                        axes[pattern, suffix][axis] = source
    return {
        pattern: [
            (suffix, tuple(axes[pattern, suffix]), mask.ndim > len(shapes[names[0]]))
            for (one, suffix), mask in masks.items()
            if one == pattern and bool(mask.any())
        ]
        for pattern, names in few.items()
    }


def _code(shape: tuple[int, ...]) -> torch.dtype:
    # As narrow as holds every index: the codes of a fused weight are as many as its elements.
    return torch.int16 if max(shape, default=0) < 2**15 else torch.int32


def _filled(shape: tuple[int, ...], value: int) -> Tensor:
    return torch.full(shape, value, dtype=_code(shape))


def _index(shape: tuple[int, ...], axis: int) -> Tensor:
    if axis >= len(shape):
        return _filled(shape, -1)
    view = [1] * len(shape)
    view[axis] = -1
    return torch.arange(shape[axis], dtype=_code(shape)).view(view).expand(shape)


def _runs_along(index: Tensor, mask: Tensor, axis: int) -> bool:
    """Say whether, within ``mask``, ``index`` counts up along ``axis``."""
    view = [1] * mask.ndim
    view[axis] = -1
    here = torch.arange(mask.shape[axis], dtype=index.dtype).view(view)
    return bool(((index == here) | ~mask).all())
