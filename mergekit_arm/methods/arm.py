"""ARM: Activation-guided Rotation-aware Merging (arXiv 2602.03237), one step of the stream.

    W ← W + Σ_i η_i τ'_i       τ'_i: the task vector W_i − W, aligned and rotated by the current
                               model's activation subspace (``step.py`` has the equations); or,
                               where ``task_stats`` are given, turned so as not to forget
                               (``retaining.py``)

Only the paper's abstract is public to us: the formulas are ours and contain each of its elements.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any
from weakref import WeakSet

from mergekit.merge_methods import ParameterScope, PerInputValues, TensorGroup
from torch import Tensor

from mergekit_arm.errors import InputError
from mergekit_arm.methods.base import Found, OptOut, StatisticsMethod
from mergekit_arm.methods.parameters import Unwritten, number, statistics
from mergekit_arm.methods.planning import PlannedTensor
from mergekit_arm.methods.retaining import Retention, retaining_step, retention
from mergekit_arm.methods.step import Incoming, arm_step
from mergekit_arm.methods.stored import StoredMoment, once, stored_moment
from mergekit_arm.statistics.format import EXPERTS
from mergekit_arm.statistics.kinds.subspace import SUBSPACE
from mergekit_arm.statistics.read import Statistics

LOG = logging.getLogger(__name__)

TASK = "task_stats"
"""The parameter with which a step does not forget."""

ALPHA = 0.9
"""How much of the correlations between channels a step that does not forget believes."""

_NO_TURN = OptOut("turn", 0, "stepped along without a turn")

_WARNED: WeakSet[Statistics] = WeakSet()


class ArmMerge(StatisticsMethod):
    """One ARM step: the base is the current model, every other input an incoming checkpoint.

    Holds one tensor's inputs, the result, and the basis of the inputs' subspace.
    """

    name = "arm"
    title = "ARM"
    url = "https://arxiv.org/abs/2602.03237"
    every_input = True
    further = (TASK,)
    least_dimensions = 2
    opt_out = OptOut("rotation", 0, "stepped along without a rotation")
    parameters = (
        number(
            "learning_rate",
            1.0,
            *(0, 2),
            "η: how far to step along this model's task vector",
            scope=ParameterScope.NON_BASE,
            open_low=True,
        ),
        number("rotation", -1.0, -1, 1, "ρ: below 0 away from the activation subspace, 0 none"),
        number(
            "alignment", 0.0, 0, 1, "γ: share of the principal angles between the subspaces undone"
        ),
        number(
            "energy",
            0.01,
            *(0, 1),
            "p: share of the input's second moment the subspace holds; 0.01: leading direction",
            open_low=True,
        ),
        statistics(
            TASK,
            "Statistics of the base on the task's text; the step then does not forget",
            optional=True,
        ),
        number("retain", 0.3, 0, 1000, "κ, with task_stats: how much general text counts"),
        number("turn", 1.0, 0, 1, "s, with task_stats: share of the way turned, 0 none"),
    )

    def needs(self, parameters: Mapping[str, Any], *, is_base: bool) -> bool:
        """Without a turn, a rotation and an alignment a step is plain task arithmetic."""
        if parameters[TASK] is not None:
            return is_base and parameters["turn"] != 0
        return parameters["alignment"] > 0 or (is_base and parameters["rotation"] != 0)

    def reason_for_own(self, parameters: Mapping[str, Any]) -> str:
        """Return what makes every input need statistics of its own."""
        return "alignment > 0"

    def opting_out(self, parameters: Mapping[str, Any]) -> OptOut | None:
        """Return the parameter that steps along a weight as it is."""
        return self.opt_out if parameters[TASK] is None else _NO_TURN

    def read(self, found: Found, parameters: Mapping[str, Any]) -> Tensor | StoredMoment | None:
        """Return the basis of the dominant input subspace, in × k; None for experts and heads.

        With ``task_stats``, where the second moment of the inputs is stored; None for heads.
        """
        if parameters[TASK] is not None:
            return stored_moment(found, diagonal=False)
        site = found.statistics.metadata.sites[found.record.site or ""]
        if site.no_subspace == EXPERTS:
            _warn_unturned(found.statistics)
        return SUBSPACE.basis(found.statistics, found.record, parameters["energy"])

    def check(self, found: Found, parameters: Mapping[str, Any]) -> None:
        """Check that enough was stored, without reading it."""
        if parameters[TASK] is not None:
            stored_moment(found, diagonal=False)
        else:
            SUBSPACE.columns(found.statistics, found.record, parameters["energy"])

    def check_planned(self, planned: PlannedTensor) -> None:
        """Check that the parameters go together, and the statistics."""
        _check_together(planned.parameters)
        super().check_planned(planned)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Take one step with one weight.

        Raises:
            InputError: the statistics do not belong to the tensor at hand, or lack it, or
                parameters that do not go together.
        """
        _check_together(parameters)
        if parameters[TASK] is not None:
            return self._retain(group, parameters)
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

    def _retain(self, group: TensorGroup, parameters: Mapping[str, Any]) -> Tensor:
        """Take one step that is turned to stay where it is on general text."""
        base = group.base
        assert base is not None
        rates: PerInputValues[float] = parameters["learning_rate"]
        task = self.find(group, base, parameters, TASK)
        general = self.find(group, base, parameters)
        towards = None
        if task and general and task.values and general.values:
            towards = _towards(task.values, general.values, parameters["retain"])
        incoming = [Incoming(entry.tensor, rates[entry.id]) for entry in group.non_base]
        result, kept = retaining_step(
            base.tensor,
            incoming,
            towards,
            turn=parameters["turn"],
            input_axis=-1 if task is None else task.input_axis,
        )
        if kept and task is not None and task.values.found.statistics.first("kept"):
            LOG.warning(
                "%s: %d rows keep their direction, since nothing of them is left on the task's "
                "inputs (said of the first weight only)",
                group.metadata.name,
                kept,
            )
        return result


def together(given: Collection[str], *, task: bool) -> str | None:
    """Say which of the parameters ``given`` has no meaning with, or without, ``task_stats``."""
    for name in ("rotation", "alignment", "energy") if task else ("retain", "turn"):
        if name in given:
            return f"{name} has no meaning with{'' if task else 'out'} {TASK}"
    return None


def _check_together(parameters: Mapping[str, Any]) -> None:
    given = {name for name, value in parameters.items() if not isinstance(value, Unwritten)}
    problem = together(given, task=parameters[TASK] is not None)
    if problem:
        remedy = "remove it" if parameters[TASK] is not None else f"remove it, or add {TASK}"
        raise InputError(f"arm: {problem}: {remedy}")


def _towards(task: StoredMoment, general: StoredMoment, retain: float) -> Retention:
    """Return the map of a weight's inputs, shared by all weights that read them."""

    def solve() -> Retention:
        return retention(task.read(ALPHA), general.read(ALPHA), retain=retain)

    return once([task, general], ("arm", retain), solve)


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
