"""ARM: Activation-guided Rotation-aware Merging (arXiv 2602.03237), one step of the stream.

    W ← W + Σ_i η_i τ'_i       τ'_i: the task vector W_i − W, aligned and rotated by the current
                               model's activation subspace (``step.py`` has the equations)

Only the paper's abstract is public to us: the formulas are ours and contain each of its elements.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from mergekit.merge_methods import ParameterScope, PerInputValues, TensorGroup
from torch import Tensor

from mergekit_arm.methods.base import Found, OptOut, StatisticsMethod
from mergekit_arm.methods.parameters import number
from mergekit_arm.methods.step import Incoming, arm_step
from mergekit_arm.statistics.format import EXPERTS
from mergekit_arm.statistics.kinds.subspace import SUBSPACE
from mergekit_arm.statistics.read import Statistics

LOG = logging.getLogger(__name__)

_WARNED: WeakSet[Statistics] = WeakSet()


class ArmMerge(StatisticsMethod):
    """One ARM step: the base is the current model, every other input an incoming checkpoint.

    Holds one tensor's inputs, the result, and the basis of the inputs' subspace.
    """

    name = "arm"
    title = "ARM"
    url = "https://arxiv.org/abs/2602.03237"
    every_input = True
    least_dimensions = 2
    opt_out = OptOut("rotation", 0, "stepped along without a rotation")
    parameters = (
        number(
            "learning_rate",
            0.5,
            *(0, 2),
            "η: how far to step along this model's task vector",
            scope=ParameterScope.NON_BASE,
            open_low=True,
        ),
        number("rotation", -0.4, -1, 1, "ρ: below 0 away from the activation subspace, 0 none"),
        number(
            "alignment", 0.0, 0, 1, "γ: share of the principal angles between the subspaces undone"
        ),
        number(
            "energy",
            0.9,
            *(0, 1),
            "p: share of the input's second moment the subspace holds",
            open_low=True,
        ),
    )

    def needs(self, parameters: Mapping[str, Any], *, is_base: bool) -> bool:
        """Without a rotation and an alignment a step is plain task arithmetic."""
        return parameters["alignment"] > 0 or (is_base and parameters["rotation"] != 0)

    def reason_for_own(self, parameters: Mapping[str, Any]) -> str:
        """Return what makes every input need statistics of its own."""
        return "alignment > 0"

    def read(self, found: Found, parameters: Mapping[str, Any]) -> Tensor | None:
        """Return the basis of the dominant input subspace, in × k; None for experts and heads."""
        site = found.statistics.metadata.sites[found.record.site or ""]
        if site.no_subspace == EXPERTS:
            _warn_unturned(found.statistics)
        return SUBSPACE.basis(found.statistics, found.record, parameters["energy"])

    def check(self, found: Found, parameters: Mapping[str, Any]) -> None:
        """Check that enough energy was stored, without reading the basis itself."""
        SUBSPACE.columns(found.statistics, found.record, parameters["energy"])

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Take one step with one weight.

        Raises:
            InputError: the statistics do not belong to the tensor at hand, or lack it.
        """
        base = group.base
        assert base is not None  # the contract requires it
        rates: PerInputValues[float] = parameters["learning_rate"]
        current = self.find(group, base, parameters)
        basis = None if current is None else current.values
        incoming = []
        for entry in group.non_base:
            own = None if basis is None else self.find(group, entry, parameters)
            own_basis = None if own is None else own.values
            incoming.append(
                Incoming(entry.tensor, rates[entry.id], _beside(base.tensor, own_basis))
            )
        return arm_step(
            base.tensor,
            incoming,
            _beside(base.tensor, basis),
            rotation=parameters["rotation"],
            alignment=parameters["alignment"],
            input_axis=-1 if current is None else current.input_axis,
        )


def _beside(tensor: Tensor, basis: Tensor | None) -> Tensor | None:
    return None if basis is None else basis.to(tensor.device)


def _warn_unturned(statistics: Statistics) -> None:
    """Say once that experts have no subspaces: they may be most of the model."""
    if statistics in _WARNED:
        return
    _WARNED.add(statistics)
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
