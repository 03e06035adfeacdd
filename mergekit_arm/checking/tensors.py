"""The planned tensors: there, of one shape, and such that their method can merge them.

What a method makes of its parameters' values shows only when it merges. So every combination of
values that a plan holds is tried on a few random numbers, by mergekit's own task.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.architecture import WeightInfo
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from torch import Tensor

from mergekit_arm.checking.findings import Repeated
from mergekit_arm.checking.models import Header, Model
from mergekit_arm.checking.planning import Planned, quiet
from mergekit_arm.errors import InputError, first_line
from mergekit_arm.methods.aim import ActivationInformedMerge
from mergekit_arm.methods.base import StatisticsMethod
from mergekit_arm.methods.planning import stored_tensor

_SMALL = 6
"""Longest axis of the tensors on which a method is tried."""
_BUFFER = 1 << 16
"""Elements of an integer tensor that is looked at; a longer one holds quantised weights."""


class TensorCheck:
    """Checks one planned tensor after another."""

    def __init__(
        self,
        config: MergeConfiguration,
        models: Mapping[ModelReference, Model],
        *,
        realigned: bool,
    ) -> None:
        """``realigned``: a tokenizer is built, to whose vocabulary tensors are brought."""
        self._dtype = config.dtype
        self._models = models
        self.found = Repeated()
        """What is wrong, in the order of the tensors."""
        self._realigned = realigned
        self._tried: set[Hashable] = set()
        self._types = {model: one.config.model_type for model, one in models.items()}

    def check(self, planned: Planned) -> None:
        """Find what is wrong with one tensor, and add it to ``found``."""
        headers = {}
        for model, weight in planned.inputs.items():
            found = self._header(model, weight)
            if found is not None:
                headers[model] = found
            elif not weight.optional and not self._converts(model, weight):
                self._error(weight.name, f"model {model} has no tensor {weight.name}")
                return
        if planned.task is None:
            return
        if not self._fit(planned, headers):
            return
        if len(headers) == len(planned.inputs) or planned.weight.optional:
            self._try(planned.task, headers)

    def _header(self, model: ModelReference, weight: WeightInfo) -> Header | None:
        names = [weight.name, *(weight.aliases or ()), *(weight.tied_names or ())]
        headers = self._models[model].headers
        header = next((headers[name] for name in names if name in headers), None)
        dtype = getattr(torch, weight.force_dtype or self._dtype or "", None)
        return header and Header(header.shape, dtype or header.dtype)

    def _converts(self, model: ModelReference, weight: WeightInfo) -> bool:
        """Say whether mergekit makes the tensor of others, such as fused experts."""
        names = [weight.name, *(weight.aliases or ())]
        have = set(self._models[model].headers)
        return any(can_convert_checkpoint_keys(self._types[model], have, one) for one in names)

    def _fit(self, planned: Planned, headers: Mapping[ModelReference, Header]) -> bool:
        """Check shapes and dtypes."""
        name, axis = planned.weight.name, planned.weight.vocabulary_axis
        shapes = {model: list(one.shape) for model, one in headers.items()}
        if axis is not None and self._realigned:
            shapes = {m: [*one[:axis], -1, *one[axis + 1 :]] for m, one in shapes.items()}
        first = next(iter(shapes), None)
        for model, shape in shapes.items():
            if first is not None and shape != shapes[first]:
                cure = (
                    "; vocabularies are brought into line by tokenizer: {source: base}"
                    if axis is not None
                    else ": merge models of the same shapes"
                )
                self._error(
                    name,
                    f"{name} has shape {list(headers[model].shape)} in {model}, but "
                    f"{list(headers[first].shape)} in {first}{cure}",
                )
                return False
        integers = [model for model, one in headers.items() if not one.dtype.is_floating_point]
        return not integers or self._check_buffer(planned, headers)

    def _check_buffer(self, planned: Planned, headers: Mapping[ModelReference, Header]) -> bool:
        """Check what is not of floating point: mergekit copies it where all inputs agree."""
        name = planned.weight.name
        if any(torch.Size(one.shape).numel() > _BUFFER for one in headers.values()):
            self._error(
                name,
                f"{name} is of integers: mergekit merges no quantised models; name the model from "
                "which it was quantised",
            )
            return False
        stored = [stored_tensor(model, planned.inputs[model].name) for model in headers]
        known = [one for one in stored if one is not None]
        for one in known[1:]:
            if one.dtype != known[0].dtype or not torch.equal(one, known[0]):
                self._error(
                    name,
                    f"{name} is of integers and differs between the models: mergekit merges only "
                    "buffers that agree",
                )
                return False
        return False  # a copy, of which there is nothing to try

    def _try(self, task: ExecuteMergeMethodTask, headers: Mapping[ModelReference, Header]) -> None:
        method = merge_methods.get(task.method_name)
        parameters = dict(task.parameters.items())
        if isinstance(method, ActivationInformedMerge):
            parameters["omega"] = 1.0  # the wrapped merge is tried; nothing of it is relaxed
            method = method.inner
        if isinstance(method, StatisticsMethod):
            return  # has checked everything while mergekit planned
        shape = (
            [min(size, _SMALL) for size in next(iter(headers.values())).shape] if headers else []
        )
        own = {
            str(model): tuple(sorted((name, repr(value)) for name, value in values.items()))
            for model, values in task.input_parameters.items()
        }
        key = (
            repr(sorted(parameters.items(), key=str)),
            tuple(own.items()),
            tuple((str(model), one.dtype) for model, one in headers.items()),
            tuple(shape),
            task.output_weight.optional,
        )
        if key in self._tried:
            return
        self._tried.add(key)
        trial = task.model_copy(update={"parameters": ImmutableMap(parameters)})
        generator = torch.Generator().manual_seed(len(self._tried))
        inputs = {
            model: torch.randn(shape, generator=generator).to(one.dtype)
            for model, one in headers.items()
        }
        self._execute(trial, inputs)

    def _execute(
        self, trial: ExecuteMergeMethodTask, inputs: Mapping[ModelReference, Tensor]
    ) -> None:
        name = trial.output_weight.name
        try:
            with quiet(), torch.random.fork_rng(devices=[]):
                merged = trial.execute(dict(inputs))
        except InputError as error:
            self._error(name, error.message)
        except Exception as error:  # whatever a method raises
            self._error(
                name,
                f"{trial.method_name} cannot merge {name} with these values: {first_line(error)}",
            )
        else:
            self._check_merged(trial, merged)

    def _check_merged(self, trial: ExecuteMergeMethodTask, merged: Any) -> None:
        name = trial.output_weight.name
        if merged is None:
            if not trial.output_weight.optional:
                self._error(name, f"{trial.method_name} makes nothing of {name}")
        elif not torch.isfinite(merged.float()).all():
            self._error(
                name,
                f"{trial.method_name} makes NaN or infinity of {name} with these values: do the "
                "weights add up to 0?",
            )

    def _error(self, name: str, message: str) -> None:
        self.found.add(message, [name])
