"""What mergekit knows of an output tensor while it plans a merge.

mergekit plans tensor by tensor. It first validates the parameters' values, then makes an
``ExecuteMergeMethodTask`` of them, and that asks the method whether it can take these inputs,
giving the output's name only. Values and names would meet again when the tensor is merged, after
the first files have been written. The task has both, and each input's own name of the tensor,
which ``slices`` make different from the output's.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from zipfile import is_zipfile

import torch
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from safetensors import SafetensorError
from torch import Tensor

from mergekit_arm.errors import InputError, first_line

_UNREADABLE = (
    OSError, RuntimeError, KeyError, TypeError, EOFError, SafetensorError, pickle.UnpicklingError
)  # fmt: skip
"""What the libraries raise of files that are absent or damaged."""


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor of a merge that is being planned."""

    base: ModelReference | None
    names: Mapping[ModelReference, str]
    """Each input's own name of the tensor, by model, in the order of the configuration."""
    parameters: Mapping[str, Any]
    """Validated values, as ``merge_group`` will get them: a mapping by model, or one value."""
    realigned: bool = False
    """mergekit brings the inputs' vocabularies into line first: they may differ in shape."""


def tensor_being_planned() -> PlannedTensor | None:
    """Return the tensor that mergekit asks its caller's caller about; None where none is planned.

    To be called by a method's ``validate_inputs``, which mergekit gives the output's name alone.
    Nothing else that mergekit offers links the two without guessing from the order of its calls,
    which goes wrong when merges fail half-way or share a thread, so this looks at the caller.
    """
    caller = sys._getframe(2)  # 0: this function, 1: validate_inputs
    task = caller.f_locals.get("self")
    if (
        caller.f_code.co_name != "validate_configured_inputs"
        or not isinstance(task, ExecuteMergeMethodTask)
        or not hasattr(task, "input_parameters")
    ):
        return None
    gathered: Any = task.gather_tensors
    realigned = hasattr(gathered, "gather_tensors")
    while hasattr(gathered, "gather_tensors"):  # one that cuts vocabularies has a weight_info too
        gathered = gathered.gather_tensors
    if hasattr(gathered, "weight_info"):
        names = {model: gathered.weight_info[model].name for model in task.model_order}
    else:  # mergekit-pytorch, where every input has the output's name
        names = dict.fromkeys(task.model_order, task.output_weight.name)
    parameters = dict(task.parameters.items())
    for model, values in task.input_parameters.items():
        for name, value in values.items():
            parameters.setdefault(name, {})[model] = value
    return PlannedTensor(task.base_model, names, parameters, realigned)


class HeadersOnly(LazyTensorLoader):  # type: ignore[misc]  # mergekit is untyped
    """Knows a model's names and none of its values, as where only headers have been fetched."""


def stored_tensor(model: ModelReference, name: str) -> Tensor | None:
    """Return a model's tensor, mapped from its file and not yet read, or None.

    None for what no file holds under this name, tied weights and tensors that mergekit converts,
    for files of torch before 1.6, which cannot be mapped, and where headers alone are at hand.

    Raises:
        InputError: the file is absent or damaged, or lacks what the checkpoint's index promises.
    """
    loader = _loader(model)
    if isinstance(loader, HeadersOnly) or name not in loader.index.tensor_paths:
        return None
    file = loader.index.tensor_paths[name]
    try:
        if loader.index.is_safetensors:
            tensor: Tensor = loader.get_tensor(name)
            return tensor
        path = os.path.join(loader.index.base_path, file)
        status = os.stat(path)
        pickled = _mapped(path, status.st_mtime_ns, status.st_ino, status.st_size)
        return None if pickled is None else pickled[name]
    except _UNREADABLE as error:
        raise InputError(
            f"model {model}: cannot read {name} in {file} ({first_line(error)}); "
            "copy or download the model again"
        ) from error


def check_shapes(planned: PlannedTensor) -> None:
    """Refuse inputs of other shapes than the first one's, which mergekit finds out too late.

    Raises:
        InputError: naming both models.
    """
    if planned.realigned:
        return
    stored = {model: stored_tensor(model, name) for model, name in planned.names.items()}
    shapes = {
        model: list(one.shape)
        for model, one in stored.items()
        if one is not None and one.is_floating_point()
    }
    first = next(iter(shapes), None)
    for model, shape in shapes.items():
        if first is not None and shape != shapes[first]:
            raise InputError(
                f"{planned.names[model]} has shape {shape} in {model}, but {shapes[first]} in "
                f"{first}: merge models of the same shapes; vocabularies that differ are brought "
                "into line by tokenizer: {source: base}"
            )


def all_equal(tensors: Sequence[Tensor]) -> bool:
    """Say whether all tensors hold the same values, in whatever dtype."""
    first, *others = tensors
    return all(torch.equal(first, other.to(first.dtype)) for other in others)


def _loader(model: ModelReference) -> LazyTensorLoader:
    if os.path.isfile(model.model.path):  # mergekit-pytorch merges files
        return _file_loader(model.model.path)
    return LoaderCache().get(model)


@lru_cache(maxsize=8)
def _mapped(path: str, *_version: int) -> Mapping[str, Tensor] | None:
    """Map a pickled file, of which nothing but numbers is unpickled; see ``stored_tensor``."""
    if not is_zipfile(path):
        return None
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    found: Mapping[str, Tensor] = saved.get("state_dict", saved)
    return found


@lru_cache(maxsize=4)
def _file_loader(path: str) -> LazyTensorLoader:
    return LazyTensorLoader(ShardedTensorIndex.from_file(path))
