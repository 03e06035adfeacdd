"""A merge once more, tensor by tensor, from its configuration and its inputs; nothing is written.

mergekit plans the merge again. Of every planned tensor the inputs are read, and the merged one is
compared with the base's. Under AIM, the wrapped method merges them anew with ω = 1: that is what
AIM relaxed, which no file holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.merge_methods import MergeMethod, TensorEntry, TensorGroup
from mergekit.merge_methods.base import TensorMetadata
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_arm.checking.document import Document
from mergekit_arm.checking.findings import Findings
from mergekit_arm.checking.keys import parse
from mergekit_arm.checking.models import Model, loaders
from mergekit_arm.checking.planning import plan, quiet
from mergekit_arm.errors import InputError, first_line
from mergekit_arm.merging.movement import compare
from mergekit_arm.methods import register_all
from mergekit_arm.methods.aim import ActivationInformedMerge, gain
from mergekit_arm.models.tensors import CheckpointTensors, open_tensors


@dataclass(frozen=True)
class TensorFate:
    """What a merge did to one tensor. Norms are Frobenius norms."""

    name: str
    base: float
    """‖W‖, W the base's."""
    after: float
    """‖W' − W‖, W' the merged model's."""
    before: float | None = None
    """‖W_m − W‖, W_m what AIM relaxed; None under another method, or where inputs are gone."""
    angle: float | None = None
    """Degrees between W' − W and the mean task vector; None where one of them is zero."""
    factors: Tensor | None = None
    """AIM's, of every input channel; None where it left the tensor as merged."""
    random: bool = False
    """Whether the wrapped method drew random numbers: then W_m is another draw."""


class Replay:
    """A planned merge whose inputs are all here."""

    def __init__(self, document: Document, folders: Mapping[ModelReference, Path]) -> None:
        """Let mergekit plan ``document``, with each of its models read from its folder.

        Raises:
            InputError: the merge cannot be planned (any more); the message says why.
        """
        register_all()
        paths = {str(reference): str(folder) for reference, folder in folders.items()}
        findings = Findings(Document(document.file, _replaced(document.value, paths)))
        config = parse(findings.document, findings)
        if config is None:
            raise InputError(findings.errors[0].message)
        try:
            self._models = {
                reference: Model(reference, reference.config(), {}, Path(reference.model.path))
                for reference in config.referenced_models()
            }
        except Exception as error:  # whatever code a configuration's class runs
            raise InputError(first_line(error)) from error
        with loaders(self._models):
            planned = plan(config, MergeOptions(), findings)
        if planned is None or findings.errors:
            raise InputError(findings.errors[0].message)
        self._tasks = [one.task for one in planned.tensors if one.task is not None]
        self._method = merge_methods.get(config.merge_method)

    def __len__(self) -> int:
        """Return how many tensors are planned."""
        return len(self._tasks)

    def fates(self, merged: CheckpointTensors) -> Iterator[TensorFate | None]:
        """Yield what became of every planned tensor; holds one tensor's inputs at a time.

        None for what cannot be compared: it has no base, is not of floating-point numbers, or has
        another shape than the base's.

        Raises:
            InputError: the statistics are not (any longer) the base's.
        """
        for task in self._tasks:
            # The cache is a whole process's, and whoever draws a page may merge something else.
            with loaders(self._models), quiet():
                inputs = _executed(task.gather_tensors)
                yield _fate(task, self._method, inputs, merged)


def fates_by_name(base: Path, merged: CheckpointTensors) -> Iterator[TensorFate | None]:
    """Yield how far every tensor of ``merged`` is from the base's of the same name.

    Raises:
        InputError: the base cannot be read.
    """
    before = open_tensors(str(base), base)
    for name in merged.names:
        if name in before:
            yield _moved(name, before.get(name), merged.get(name))
        else:
            yield None


def _fate(
    task: ExecuteMergeMethodTask,
    method: MergeMethod,
    inputs: Mapping[ModelReference, Tensor],
    merged: CheckpointTensors,
) -> TensorFate | None:
    weight = task.output_weight
    names = [weight.name, *(weight.aliases or ()), *(weight.tied_names or ())]
    name = next((one for one in names if one in merged), None)
    base = inputs.get(task.base_model)
    if name is None or base is None:
        return None
    others = [tensor for model, tensor in inputs.items() if model != task.base_model]
    fate = _moved(weight.name, base, merged.get(name), others)
    if fate is None or not isinstance(method, ActivationInformedMerge):
        return fate
    state = torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        unrelaxed = _at_omega_one(task).execute(dict(inputs))
        random = not torch.equal(torch.get_rng_state(), state)
    before = None
    if unrelaxed is not None and unrelaxed.shape == base.shape:
        before = _distance(unrelaxed, base)
    factors = _factors(task, method, inputs)
    return TensorFate(fate.name, fate.base, fate.after, before, fate.angle, factors, random)


def _moved(
    name: str, base: Tensor, merged: Tensor, others: list[Tensor] | None = None
) -> TensorFate | None:
    if not (base.is_floating_point() and base.numel() and base.shape == merged.shape):
        return None
    size = float(torch.linalg.vector_norm(base, dtype=torch.float64))
    alike = [one for one in others or [] if one.shape == base.shape]
    if not alike:
        return TensorFate(name, size, _distance(merged, base))
    goal = alike[0] if len(alike) == 1 else torch.stack([one.float() for one in alike]).mean(0)
    move = compare(merged, base, goal)
    return TensorFate(name, size, move.update, angle=move.angle if move.matrix else None)


def _distance(one: Tensor, other: Tensor) -> float:
    return compare(one, other, other).update


def _at_omega_one(task: ExecuteMergeMethodTask) -> ExecuteMergeMethodTask:
    changed = ImmutableMap({**dict(task.parameters.items()), "omega": 1.0})
    return task.model_copy(update={"parameters": changed})


def _factors(
    task: ExecuteMergeMethodTask,
    method: ActivationInformedMerge,
    inputs: Mapping[ModelReference, Tensor],
) -> Tensor | None:
    """Return what AIM multiplied each input channel with; None where it left them alone."""
    entries = tuple(
        TensorEntry(id=model, tensor=inputs[model], is_base=model == task.base_model)
        for model in task.model_order
        if model in inputs
    )
    group = TensorGroup(entries, TensorMetadata.from_weight_info(task.output_weight))
    parameters: dict[str, Any] = dict(task.parameters.items())
    for model, values in task.input_parameters.items():
        for name, value in values.items():
            parameters.setdefault(name, {})[model] = value
    found = method.find(group, group.base, parameters)
    return None if found is None else gain(found.values, parameters["omega"])


def _executed(task: Task) -> Any:
    """Return the value of a task, and of those it depends on."""
    return task.execute(**{name: _executed(one) for name, one in task.arguments().items()})


def _replaced(value: Any, words: Mapping[str, str]) -> Any:
    """Return a document in which every string that is a key of ``words`` is what that says."""
    if isinstance(value, dict):
        return {key: _replaced(one, words) for key, one in value.items()}
    if isinstance(value, list):
        return [_replaced(one, words) for one in value]
    return words.get(value, value) if isinstance(value, str) else value


def referenced(document: Document) -> MergeConfiguration:
    """Return mergekit's configuration of a document.

    Raises:
        InputError: mergekit refuses it.
    """
    findings = Findings(document)
    config = parse(document, findings)
    if config is None:
        raise InputError(str(findings.errors[0]))
    return config
