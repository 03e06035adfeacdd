"""Look at a tensor's statistics while mergekit still plans the merge.

For every output tensor, mergekit first validates the parameters' values and then, in the same
thread, asks the method to validate the tensor's inputs. Neither call sees what the other does;
``Remembered`` carries the values across, so that statistics of a wrong model are refused before
the first tensor is read or written.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from typing import Any

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from mergekit_arm.errors import InputError
from mergekit_arm.statistics.reader import Statistics, open_statistics


class Remembered(threading.local):
    """The last validated values of one method's parameters, in this thread."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def note(self, name: str, value: Any) -> Any:
        """Remember ``value``; returns it, to serve as a validator."""
        self.values[name] = value
        return value

    def take(self) -> dict[str, Any]:
        """Return what was noted and forget it: execution validates inputs again, later."""
        values, self.values = self.values, {}
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


def validate_statistics(reference: Any) -> str:
    """Validate ``activation_stats``: open the directory now, so that a bad one fails early.

    Raises:
        InputError: not a string, or not a readable statistics directory.
    """
    if not isinstance(reference, str) or not reference:
        raise InputError(
            f"activation_stats must be a directory or a Hub name, not {reference!r}; "
            "`mergekit-arm calibrate MODEL DIRECTORY` writes one"
        )
    open_statistics(reference)
    return reference
