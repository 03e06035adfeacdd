"""RegMean (arXiv 2212.09849), relative to a base, from published second moments.

    R = ( Σ_i w_i C̃_i + κ C̃_0 + ε I )⁻¹ Σ_i w_i C̃_i τ_iᵀ       τ_i = W_i − W
    W ← W + λ Rᵀ                                               C̃ = α C + (1 − α) diag C

C_i = E[x xᵀ] is of the inputs of model i on text of its own task, C_0 of the base's. The merged
weight comes as near as it can to what each model's weight makes of that model's own inputs.
``regression.py`` has the step, ``moments.py`` the algebra, ``REGMEAN.md`` what was tried.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit.merge_methods import ParameterScope, TensorGroup
from torch import Tensor

from mergekit_arm.errors import InputError
from mergekit_arm.methods.base import Found, Measured, OptOut, StatisticsMethod
from mergekit_arm.methods.moments import LeastSquares, least_squares, plain_average
from mergekit_arm.methods.parameters import choice, number
from mergekit_arm.methods.regression import regression_step
from mergekit_arm.methods.stored import StoredMoment, no_moment, once, stored_moment
from mergekit_arm.statistics.format import EXPERTS
from mergekit_arm.statistics.read import Statistics

LOG = logging.getLogger(__name__)


class RegMeanMerge(StatisticsMethod):
    """Every input but the base is a model with statistics of its own.

    Holds one tensor's inputs, the result, working copies of a few rows, and what the last few
    inputs of layers have been solved to.
    """

    name = "regmean"
    title = "RegMean"
    url = "https://arxiv.org/abs/2212.09849"
    every_input = True
    base_optional = True
    least_dimensions = 2
    opt_out = OptOut("moments", "none", "averaged without them")
    parameters = (
        number(
            "weight",
            1.0,
            *(0, 1000),
            "w: how much this model's inputs count",
            scope=ParameterScope.NON_BASE,
        ),
        number("scale", 1.0, 0, 2, "λ: how much of the merged task vector is added to the base"),
        number("alpha", 0.9, 0, 1, "α: how much of the correlations between channels is believed"),
        number("ridge", 0.0, 0, 1, "ε, as a share of the mean of the second moments' diagonals"),
        number("retain", 0.0, 0, 1000, "κ: how much the base counts on its own inputs"),
        choice(
            "moments",
            "full",
            ("full", "diagonal", "none"),
            "full, diagonal (importance is enough), or none: a plain weighted average",
        ),
    )

    def needs(self, parameters: Mapping[str, Any], *, is_base: bool) -> bool:
        """The base's own inputs count only where it is to retain something."""
        if parameters["moments"] == "none" or parameters["scale"] == 0:
            return False
        return not is_base or parameters["retain"] > 0

    def reason_for_own(self, parameters: Mapping[str, Any]) -> str:
        """Return what makes an input need statistics of its own."""
        return self.spec.name  # type: ignore[no-any-return]

    def read(self, found: Found, parameters: Mapping[str, Any]) -> StoredMoment | None:
        """Return where the second moment of the weight's inputs is stored; None for the head."""
        diagonal = parameters["moments"] == "diagonal"
        hint = ", or set moments: diagonal to go by each channel's own energy"
        return stored_moment(found, diagonal=diagonal, hint=hint)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one output tensor.

        Raises:
            InputError: the statistics do not belong to an input's tensor, or lack it; shapes that
                differ.
        """
        base = group.base
        assert base is not None  # the contract requires it
        entries = group.non_base
        found = [self.find(group, entry, parameters) for entry in entries]
        anchor = self.find(group, base, parameters)
        weights = [float(parameters["weight"][entry.id]) for entry in entries]
        measured = [one for one in found if one is not None and one.values is not None]
        try:
            if measured:
                first: StoredMoment = measured[0].values
                _say_what_is_averaged(first.found.statistics, parameters["moments"] == "diagonal")
                solution = _solution(found, anchor, weights, parameters)
            else:
                solution = plain_average(weights)
            return regression_step(
                base.tensor,
                [entry.tensor for entry in entries],
                solution,
                scale=parameters["scale"],
                input_axis=measured[0].input_axis if measured else -1,
            )
        except ValueError as error:
            models = ", ".join(str(entry.id) for entry in entries)
            raise InputError(f"{group.metadata.name}: {models}: {error}") from error


def _solution(
    found: Sequence[Measured | None],
    anchor: Measured | None,
    weights: Sequence[float],
    parameters: Mapping[str, Any],
) -> LeastSquares:
    """Return the least squares of a weight's inputs, shared by all weights that read them."""
    stored = [None if one is None else one.values for one in found]
    retained: StoredMoment | None = None if anchor is None else anchor.values
    alpha, retain, ridge = (parameters[name] for name in ("alpha", "retain", "ridge"))

    def solve() -> LeastSquares:
        read = [None if one is None else one.read(alpha) for one in stored]
        like = next(one for one in read if one is not None)
        return least_squares(
            # An expert that no token of a model's text reached has no record of its own: that
            # model has no say in it.
            [no_moment(like) if one is None else one for one in read],
            weights,
            anchor=None if retained is None else retained.read(alpha),
            retain=retain,
            ridge=ridge,
        )

    present = tuple(one is not None for one in (*stored, retained))
    known = [one for one in (*stored, retained) if one is not None]
    return once(known, ("regmean", alpha, retain, ridge, *weights, present), solve)


def _say_what_is_averaged(statistics: Statistics, diagonal: bool) -> None:
    """Say once how many weights have no second moments, or only their diagonals."""
    if not statistics.first("regmean"):
        return
    sites, weights = statistics.metadata.sites, statistics.metadata.weights.values()
    matrices = [sites[one.site] for one in weights if one.site and len(one.shape) > 1]
    experts = [site for site in matrices if site.no_subspace == EXPERTS]
    solved = [site for site in matrices if diagonal or site.no_subspace in (None, EXPERTS)]
    LOG.warning(
        "activation_stats %s: %d of %d weights have no second moments (norms, biases, embeddings, "
        "the output head): regmean averages them%s",
        statistics.reference,
        len(weights) - len(solved),
        len(weights),
        f"; {len(experts)} are experts', whose moments are diagonal" if experts else "",
    )
