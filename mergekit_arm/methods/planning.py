"""Look at a tensor's statistics while mergekit still plans the merge.

For every output tensor, mergekit first validates the parameters' values and then, in the same
thread, asks the method to validate the tensor's inputs. Neither call sees what the other does;
``Remembered`` carries the values across, so that statistics of a wrong model are refused before
the first tensor is read or written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from mergekit_arm.statistics.reader import Statistics


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
    loader = LoaderCache().get(base)
    if not loader.index.is_safetensors or name not in loader.index.tensor_paths:
        return
    tensor = loader.get_tensor(name)
    if tensor.is_floating_point() and tensor.numel():
        statistics.find(name, tensor)
