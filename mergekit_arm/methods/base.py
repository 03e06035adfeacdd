"""Look at a tensor's statistics while mergekit still plans the merge.

For every output tensor, mergekit first validates the parameters' values and then, in the same
thread, asks the method to validate the tensor's inputs. Neither call sees what the other does;
``Remembered`` carries the values across, so that statistics of a wrong model are refused before
the first tensor is read or written.
"""

from __future__ import annotations

import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import LoaderCache

from mergekit_arm.statistics.matching import without_numbers
from mergekit_arm.statistics.read import Statistics

_SLICE = re.compile(r"(.*)\.slices\[(\d+)\]")


class Remembered(threading.local):
    """The values of one method's parameters that were validated last, in this thread."""

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}

    def noting(self, name: str, validator: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return ``validator``, remembering what it returns under ``name``."""

        def validate(value: Any) -> Any:
            valid = validator(value)
            self._values.setdefault(name, []).append(valid)
            return valid

        return validate

    def take(self) -> dict[str, list[Any]]:
        """Return the noted values, oldest first, and forget them.

        Forgetting matters: execution validates inputs once more, and later.
        """
        values, self._values = self._values, {}
        return values


class Plan:
    """What mergekit says of a merge while it plans it: how many slices, which output tensors.

    A method sees output names only. They are the base's own unless slices renumber its layers;
    this tells the two apart. Shared by all threads, since planning and execution may run in
    different ones.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slices: dict[str, int] = {}
        self._outputs: dict[str, set[str]] = defaultdict(set)

    def note(self, group_name: str | None) -> None:
        """Take in the name with which mergekit asks to validate a group of inputs."""
        found = _SLICE.fullmatch(group_name or "")
        with self._lock:
            if group_name is None or (found and self._outputs):
                # The first call of another merge.
                self._slices.clear()
                self._outputs.clear()
            if found:
                self._slices[found[1]] = int(found[2]) + 1
            elif group_name is not None:
                self._outputs[without_numbers(group_name)].add(group_name)

    def renumbers(self, name: str, statistics: Statistics) -> bool:
        """Say whether the output tensor ``name`` may stand for another layer of the base.

        Not where one slice fills every layer that was measured: then each is itself.
        """
        if not self._slices:
            return False
        role = without_numbers(name)
        whole = len(self._outputs[role]) == statistics.matcher.roles[role]
        return max(self._slices.values()) > 1 or not whole


def check_planned(
    statistics: Statistics, base: Hashable | None, name: str | None, inputs: Sequence[Hashable]
) -> None:
    """Check that ``statistics`` were measured on ``base`` and know its tensor ``name``.

    Compares the base's own tensor of that name, whatever slice the output takes its values
    from; a tensor that the base does not have under this name is left to execution, where the
    probe decides. Reads a few values of a safetensors file; pickled checkpoints are also left
    to execution.

    Raises:
        InputError: the statistics are another model's or lack this weight.
    """
    if not isinstance(base, ModelReference) or name is None or base not in inputs:
        return
    loader = _loader(base)
    if not loader.index.is_safetensors or name not in loader.index.tensor_paths:
        return
    tensor = loader.get_tensor(name)
    if tensor.is_floating_point() and tensor.numel():
        statistics.matcher.find(name, tensor)


def _loader(model: ModelReference) -> LazyTensorLoader:
    if os.path.isfile(model.model.path):  # mergekit-pytorch merges files
        return _file_loader(model.model.path)
    return LoaderCache().get(model)


@lru_cache(maxsize=4)
def _file_loader(path: str) -> LazyTensorLoader:
    return LazyTensorLoader(ShardedTensorIndex.from_file(path))
