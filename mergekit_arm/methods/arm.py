"""ARM: Activation-guided Rotation-aware Merging (arXiv 2602.03237), one step of the stream.

    W ← W + Σ_i η_i τ'_i       τ'_i: the task vector W_i − W, aligned and rotated by the current
                               model's activation subspace (``rotation.py`` has the equations)

Only the paper's abstract is public to us: the formulas are ours and contain each of its elements.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable
from typing import Any

from mergekit import merge_methods
from mergekit.merge_methods import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    PerInputValues,
    TensorEntry,
    TensorGroup,
)
from mergekit.merge_methods.base import ParameterSpec
from torch import Tensor

from mergekit_arm.errors import InputError
from mergekit_arm.methods.base import Plan, Remembered, check_planned
from mergekit_arm.methods.parameters import number, parameter_type, statistics_reference
from mergekit_arm.methods.step import Incoming, arm_step
from mergekit_arm.statistics.format import EXPERTS, LEFT_AS_MERGED
from mergekit_arm.statistics.read import Statistics, open_statistics

LOG = logging.getLogger(__name__)

NAME = "arm"
URL = "https://arxiv.org/abs/2602.03237"


class ArmMerge(GroupMergeMethod):  # type: ignore[misc]  # mergekit is untyped
    """One ARM step: the base is the current model, every other input an incoming checkpoint.

    Holds one tensor's inputs, the result, and the basis of the inputs' subspace.
    """

    def __init__(self) -> None:
        self._remembered = Remembered()
        self._plan = Plan()
        self._warned: set[str] = set()
        self._lock = threading.Lock()
        noting = self._remembered.noting
        self.spec = MergeMethodSpec(
            name=NAME,
            pretty_name="ARM",
            reference_url=URL,
            contract=InputContract(base=BasePolicy.REQUIRED),
            parameters=(
                ParameterSpec(
                    "activation_stats",
                    parameter_type(noting("activation_stats", statistics_reference)),
                    ParameterScope.INPUT,
                    default=None,  # refused by the validator, in one line
                    description="Statistics of the base; of each input too where alignment > 0",
                ),
                ParameterSpec(
                    "learning_rate",
                    parameter_type(number("learning_rate", 0, 2, open_low=True)),
                    ParameterScope.NON_BASE,
                    default=0.5,
                    description="η: how far to step along this model's task vector",
                ),
                ParameterSpec(
                    "rotation",
                    parameter_type(noting("rotation", number("rotation", -1, 1))),
                    ParameterScope.SHARED,
                    default=-0.4,
                    description="ρ: below 0 away from the activation subspace, 0 none",
                ),
                ParameterSpec(
                    "alignment",
                    parameter_type(noting("alignment", number("alignment", 0, 1))),
                    ParameterScope.SHARED,
                    default=0.0,
                    description="γ: share of the principal angles between the subspaces undone",
                ),
                ParameterSpec(
                    "energy",
                    parameter_type(number("energy", 0, 1, open_low=True)),
                    ParameterScope.SHARED,
                    default=0.9,
                    description="p: share of the input's second moment the subspace holds",
                ),
            ),
        )

    def validate_inputs(
        self, input_ids: Any, base_id: Any = None, *, group_name: str | None = None
    ) -> None:
        """Check the inputs' number and base, and at planning time their statistics."""
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        self._plan.note(group_name)
        planned = self._remembered.take()
        references = planned.get("activation_stats", [])
        aligned = planned.get("alignment", [0.0])[-1] > 0
        if planned.get("rotation", [0.0])[-1] == 0 and not aligned:
            return
        # One value for each input, in their order, unless a setting was a list of its own.
        if len(references) != len(input_ids):
            return
        by_input = dict(zip(input_ids, references, strict=True))
        for model, reference in by_input.items():
            if model != base_id:
                if not aligned:
                    continue
                _require_own(model, reference, by_input.get(base_id))
            check_planned(open_statistics(reference), model, group_name, input_ids)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Take one step with one weight.

        Raises:
            InputError: the statistics do not belong to the tensor at hand, or lack it.
        """
        base = group.base
        assert base is not None  # the contract requires it
        rotation, alignment = parameters["rotation"], parameters["alignment"]
        rates: PerInputValues[float] = parameters["learning_rate"]
        basis, input_axis = None, -1
        turning = (rotation != 0 or alignment > 0) and base.tensor.ndim > 1
        if turning:
            basis, input_axis = self._subspace(group, base, parameters)
        incoming = [
            Incoming(
                entry.tensor,
                rates[entry.id],
                self._subspace(group, entry, parameters)[0]
                if alignment > 0 and basis is not None
                else None,
            )
            for entry in group.non_base
        ]
        return arm_step(
            base.tensor,
            incoming,
            basis,
            rotation=rotation,
            alignment=alignment,
            input_axis=input_axis,
        )

    def _subspace(
        self, group: TensorGroup, entry: TensorEntry, parameters: dict[str, Any]
    ) -> tuple[Tensor | None, int]:
        """Return the basis of the dominant input subspace and the input axis.

        No basis for what is stepped along linearly: embeddings, experts and the output head.
        """
        reference = parameters["activation_stats"][entry.id]
        if not entry.is_base:
            _require_own(entry.id, reference, parameters["activation_stats"][group.base.id])
        statistics = open_statistics(reference)
        output = group.metadata.name or ""
        name, record = statistics.matcher.find(
            output,
            entry.tensor,
            permuted=group.metadata.vocabulary_axis is not None,
            renumbered=self._plan.renumbers(output, statistics),
        )
        if record.site is None:
            if record.reason in LEFT_AS_MERGED:
                return None, -1
            raise InputError(
                f"{name}: activation_stats {reference} have no statistics for it "
                f"({record.reason}); to step along it without a rotation, set "
                f"rotation: [{{filter: {name}, value: 0}}, {{value: {parameters['rotation']}}}]"
            )
        basis = statistics.subspace(record, parameters["energy"])
        if statistics.metadata.sites[record.site].no_subspace == EXPERTS:
            self._warn_unturned(statistics)
        assert record.input_axis is not None
        return (
            None if basis is None else basis.to(entry.tensor.device),
            record.input_axis - entry.tensor.ndim,
        )

    def _warn_unturned(self, statistics: Statistics) -> None:
        """Say once that experts have no subspaces: they may be most of the model."""
        with self._lock:
            if statistics.reference in self._warned:
                return
            self._warned.add(statistics.reference)
        sites = statistics.metadata.sites
        found = [w.site for w in statistics.metadata.weights.values() if w.site]
        count = sum(sites[site].no_subspace == EXPERTS for site in found)
        LOG.warning(
            "activation_stats %s: %d of %d weights are experts', which have no subspaces: "
            "arm steps along them without a rotation",
            statistics.reference,
            count,
            len(found),
        )


def _require_own(model: Hashable, reference: str, base_reference: str | None) -> None:
    # mergekit hands an input without a value of its own the shared one, which is the base's.
    if reference == base_reference:
        raise InputError(
            f"alignment > 0 needs statistics of {model} itself: calibrate it and set "
            "activation_stats under its own parameters"
        )


def register() -> None:
    """Register ``arm`` with mergekit."""
    if NAME not in {method.spec.name for method in merge_methods.registered_methods()}:
        merge_methods.register(ArmMerge())
