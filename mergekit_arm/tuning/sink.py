"""Merged tensors, by the names of their checkpoint, straight into a loaded model's parameters."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from typing import Any, ClassVar

import torch
from mergekit.io.tasks import TensorWriterTask
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_arm.errors import Failure, first_line
from mergekit_arm.models.names import CheckpointTensor, map_checkpoint


class ParameterSink:
    """Does with tensors what transformers does when it loads a checkpoint of these ``names``.

    What transformers fuses is held until all of its parts are there.
    """

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        self._model = model
        self._entries = {entry.name: entry for entry in map_checkpoint(model, names)}
        self._targets: dict[str, Tensor] = {
            **dict(model.named_buffers(remove_duplicate=False)),
            **dict(model.named_parameters(remove_duplicate=False)),
        }
        self._parts: dict[str, list[CheckpointTensor]] = defaultdict(list)
        for entry in self._entries.values():
            if entry.parameter is not None and entry.converter is not None:
                self._parts[entry.parameter].append(entry)
        self._waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self._missing = set(names)

    def save_tensor(self, name: str, tensor: Tensor, clone: bool = False) -> None:
        """Take a tensor, as mergekit's writer of files does.

        Raises:
            Failure: a tensor that the loaded model's checkpoint had not.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise Failure(f"the merge made {name}, which the first merge of this search had not")
        self._missing.discard(name)
        if entry.parameter is None:
            return
        if entry.converter is None:
            self._copy(entry.parameter, tensor)
            return
        waiting = self._waiting[entry.parameter]
        waiting[name] = tensor
        if len(waiting) == len(self._parts[entry.parameter]):
            self._convert(entry.parameter, self._waiting.pop(entry.parameter))

    def finalize(self) -> None:
        """Say that all has come.

        Raises:
            Failure: something has not.
        """
        if self._missing or self._waiting:
            raise Failure(f"the merge left out {min(self._missing | self._waiting.keys())}")

    def _convert(self, parameter: str, tensors: dict[str, Tensor]) -> None:
        entries = self._parts[parameter]
        assert entries[0].converter is not None
        converter = deepcopy(entries[0].converter)
        for entry in entries:  # in the order in which transformers loads them
            converter.add_tensor(parameter, entry.name, entry.pattern, tensors[entry.name])
        try:
            made = converter.convert(parameter, model=self._model, config=self._model.config)
        except Exception as error:  # transformers' operations raise whatever they meet
            raise Failure(f"{parameter} cannot be converted: {first_line(error)}") from error
        for name, value in made.items():
            self._copy(name, value[0] if isinstance(value, list) else value)

    @torch.no_grad()
    def _copy(self, parameter: str, tensor: Tensor) -> None:
        self._targets[parameter].copy_(tensor)


class SinkTask(TensorWriterTask):  # type: ignore[misc]  # mergekit is untyped
    """Stands in a merge's plan where mergekit's writer of files stands."""

    sinks: ClassVar[dict[str, ParameterSink]] = {}
    """By ``out_path``, since a task holds nothing that cannot be compared."""

    def execute(self, **_arguments: Any) -> ParameterSink:
        return self.sinks[self.out_path]
