"""A merge method that reads activation statistics: everything but its equation.

A method derives from ``StatisticsMethod``, names its parameters, says what it reads of a weight's
statistics, and merges. This module opens the statistics, finds the weight at hand in them, leaves
alone what has none by definition, and refuses what cannot work while mergekit still plans.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mergekit.common import ModelReference
from mergekit.merge_methods import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    TensorEntry,
    TensorGroup,
)
from mergekit.merge_methods.base import ParameterSpec

from mergekit_arm.errors import InputError
from mergekit_arm.methods.parameters import (
    StatisticsReference,
    earlier_model,
    found_by_name,
    statistics,
)
from mergekit_arm.methods.planning import (
    PlannedTensor,
    all_equal,
    check_shapes,
    stored_tensor,
    tensor_being_planned,
)
from mergekit_arm.statistics.format import LEFT_AS_MERGED, NO_TOKEN, WeightRecord
from mergekit_arm.statistics.read import Statistics

LOG = logging.getLogger(__name__)

STATS = "activation_stats"
"""The parameter that every method has."""


@dataclass(frozen=True)
class OptOut:
    """How a user says that a weight needs no statistics: ``parameter`` set to ``value`` for it."""

    parameter: str
    value: int | str
    effect: str
    """What then happens to the weight, after "it is"."""


@dataclass(frozen=True)
class Found:
    """Where the statistics of one input's tensor stand."""

    statistics: Statistics
    name: str
    """The name under which the weight was measured."""
    record: WeightRecord
    """Its ``site`` is set: there is something measured to read."""


@dataclass(frozen=True)
class Measured:
    """What a method has read of the statistics of one input's tensor."""

    values: Any
    """What the method's ``read`` returned."""
    input_axis: int
    """The tensor's axis that counts the layer's inputs, from the end: −1, or −2 where a weight is
    stored in × out."""


class StatisticsMethod(GroupMergeMethod):  # type: ignore[misc]  # mergekit is untyped
    """A merge method that reads activation statistics of the base, or of every input.

    Derive from it, set ``name``, ``title``, ``url`` and ``parameters``, and write ``read`` and
    ``merge_group``. The parameter ``activation_stats`` is there already. ``merge_group`` is
    mergekit's: it gets one output tensor's inputs and the parameters' values, and asks ``find``
    for the statistics of an input. An instance has no state but its specification, because
    mergekit registers one for all merges of a process.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """For humans, as in a model card."""
    url: ClassVar[str | None] = None
    """Where the method is described."""
    parameters: ClassVar[tuple[ParameterSpec, ...]] = ()
    """Its own parameters; see ``parameters.py``."""
    contract: ClassVar[InputContract] = InputContract(base=BasePolicy.REQUIRED)
    every_input: ClassVar[bool] = False
    """Whether each input model has statistics of its own; otherwise the base alone has."""
    base_optional: ClassVar[bool] = False
    """Whether the base may have none, where each input model has statistics of its own."""
    further: ClassVar[tuple[str, ...]] = ()
    """Names of shared parameters of its own that hold more statistics of the base, or None."""
    least_dimensions: ClassVar[int] = 1
    """Tensors with fewer dimensions are merged without a look at the statistics."""
    opt_out: ClassVar[OptOut | None] = None
    """How a user merges a weight that lacks statistics."""

    def __init__(self, name: str | None = None) -> None:
        """Make the method, to be registered as ``name`` if not as its own."""
        scope = ParameterScope.INPUT if self.every_input else ParameterScope.SHARED
        whose = "the base and of each input model" if self.every_input else "the base model"
        described = f"Statistics of {whose}: a directory or a Hub name"
        stats = statistics(STATS, described, scope, optional=self.base_optional)
        self.spec = MergeMethodSpec(
            name=name or self.name,
            pretty_name=self.title,
            reference_url=self.url,
            contract=self.contract,
            parameters=(stats, earlier_model(), *self.parameters),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy by name: the specification holds functions, which cannot be pickled."""
        return type(self), (self.spec.name,)

    @abstractmethod
    def read(self, found: Found, parameters: Mapping[str, Any]) -> Any:
        """Return what the equation needs of a weight's statistics.

        Raises:
            InputError: the statistics do not hold it.
        """

    def check(self, found: Found, parameters: Mapping[str, Any]) -> None:
        """Refuse, while mergekit plans, what ``read`` would refuse; to be replaced by less work."""
        self.read(found, parameters)

    def needs(self, parameters: Mapping[str, Any], *, is_base: bool) -> bool:
        """Say whether the statistics of the base, or of another input, are read at these values.

        To be replaced where some values make a method neutral.
        """
        return is_base or self.every_input

    def validate_inputs(
        self, input_ids: Any, base_id: Any = None, *, group_name: str | None = None
    ) -> None:
        """Check the inputs' number and base and, while a merge is planned, their statistics."""
        self.check_inputs(input_ids, base_id, group_name)
        planned = tensor_being_planned()
        if planned is not None:
            self.check_planned(planned)

    def check_inputs(
        self, input_ids: Sequence[Hashable], base_id: Hashable | None, group_name: str | None
    ) -> None:
        """Check the inputs' number and base."""
        super().validate_inputs(input_ids, base_id, group_name=group_name)

    def check_planned(self, planned: PlannedTensor) -> None:
        """Refuse a planned tensor whose statistics are another model's, absent or of no use.

        Opens the tensor's files and reads a few values. What no file holds as it stands is
        recognised by its name here, and by its values when it is merged.

        Raises:
            InputError: the message names the tensor and the remedy.
        """
        given = [one for one in self.further if planned.parameters[one] is not None]
        for parameter in (STATS, *given):
            values = planned.parameters[parameter]
            for reference in values.values() if isinstance(values, Mapping) else (values,):
                if reference is not None:
                    reference.names = planned.names
        check_shapes(planned)
        for model in planned.names:
            is_base = model == planned.base
            if not self.needs(planned.parameters, is_base=is_base):
                continue
            for parameter in (STATS, *given) if is_base else (STATS,):
                reference = self._reference(planned.parameters, model, planned.base, parameter)
                found = self._find_planned(planned, reference, model)
                if found is not None and len(found.record.shape) >= self.least_dimensions:
                    self._check_found(planned, found)

    def _find_planned(
        self, planned: PlannedTensor, reference: StatisticsReference, model: ModelReference
    ) -> Found | None:
        """Find a planned tensor by its values, or by its name where these cannot be looked at."""
        name, statistics = planned.names[model], reference.open()
        by_name = model == planned.base and found_by_name(statistics, planned.parameters)
        tensor = stored_tensor(model, name)
        if tensor is None:
            known = statistics.metadata.aliases.get(name, name)
            record = statistics.matcher.weights.get(known)
            return None if record is None else Found(statistics, known, record)
        if not (tensor.is_floating_point() and tensor.numel()):
            return None
        return Found(statistics, *statistics.matcher.find(name, tensor, permuted=by_name))

    def _check_found(self, planned: PlannedTensor, found: Found) -> None:
        if found.record.site is not None:
            self.check(found, planned.parameters)
        elif found.record.reason not in LEFT_AS_MERGED:
            tensors = [stored_tensor(model, name) for model, name in planned.names.items()]
            stored = [tensor for tensor in tensors if tensor is not None]
            if len(stored) == len(tensors) and not all_equal(stored):
                raise self._absent(found, planned.parameters)

    def find(
        self,
        group: TensorGroup,
        entry: TensorEntry,
        parameters: Mapping[str, Any],
        parameter: str = STATS,
    ) -> Measured | None:
        """Return what ``read`` reads of the statistics of one input of ``group``.

        ``parameter``: which holds them, ``activation_stats`` or one of ``further``.

        None where the equation does not apply: the parameters make the method neutral, the tensor
        has no statistics by definition (embeddings, biases), or all inputs are the same anyway.

        Raises:
            InputError: the statistics do not belong to this tensor, or lack it.
        """
        tensor = entry.tensor
        needed = self.needs(parameters, is_base=entry.is_base)
        if tensor.ndim < self.least_dimensions or not needed:
            return None
        base = group.base
        reference = self._reference(parameters, entry.id, base.id if base else None, parameter)
        statistics = reference.open()
        names = reference.names
        by_name = entry.is_base and found_by_name(statistics, parameters)
        name, record = statistics.matcher.find(
            (names or {}).get(entry.id) or group.metadata.name or "",
            tensor,
            permuted=by_name or group.metadata.vocabulary_axis is not None,
            # Where the inputs' own names are hidden, output names may be other layers'.
            renumbered=names is None and isinstance(entry.id, ModelReference),
        )
        found = Found(statistics, name, record)
        if record.site is None:
            opt_out = self.opting_out(parameters)
            if record.reason == NO_TOKEN and opt_out:
                LOG.warning("%s: %s: it is %s", name, record.reason, opt_out.effect)
            if record.reason in LEFT_AS_MERGED or all_equal(group.tensors):
                return None
            raise self._absent(found, parameters)
        assert record.input_axis is not None  # a measured weight has one
        return Measured(self.read(found, parameters), record.input_axis - tensor.ndim)

    def _reference(
        self,
        parameters: Mapping[str, Any],
        model: Hashable,
        base: Hashable | None,
        parameter: str,
    ) -> StatisticsReference:
        values = parameters[parameter]
        reference: StatisticsReference | None = values
        shared = None
        if isinstance(values, Mapping):
            reference, shared = values[model], values.get(base)
        # mergekit hands an input without a value of its own the shared one, which is the base's.
        if reference is None or (model != base and reference == shared):
            where = "its own" if model != base else "the top-level"
            raise InputError(
                f"{self.reason_for_own(parameters)} needs statistics of {model} itself: calibrate "
                f"it and set {parameter} under {where} parameters"
            )
        return reference

    def reason_for_own(self, parameters: Mapping[str, Any]) -> str:
        """Return what makes every input need statistics of its own, to begin a message with."""
        return self.spec.name  # type: ignore[no-any-return]

    def opting_out(self, parameters: Mapping[str, Any]) -> OptOut | None:
        """Return how a user merges a weight that lacks statistics, at these values."""
        return self.opt_out

    def _absent(self, found: Found, parameters: Mapping[str, Any]) -> InputError:
        problem = (
            f"{found.name}: activation_stats {found.statistics.reference} have no statistics for "
            f"it ({found.record.reason})"
        )
        opt_out = self.opting_out(parameters)
        if opt_out is None:
            return InputError(f"{problem}; calibrate on data that uses it")
        name, value, otherwise = opt_out.parameter, opt_out.value, parameters[opt_out.parameter]
        return InputError(
            f"{problem}; for it to be {opt_out.effect}, set "
            f"{name}: [{{filter: {found.name}, value: {value}}}, {{value: {otherwise}}}]"
        )
