"""The numbers of one measured input."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.kinds.subspace import SUBSPACE
from mergekit_arm.statistics.read import Statistics

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


def layer_of(name: str) -> int | None:
    """Return the layer's number in a name, the first one of several; None outside the layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def mean_abs(statistics: Statistics, site: str) -> Tensor | None:
    """Return mean |x| of every channel of an input, float64: ``(in,)``, or ``(experts, in)``.

    Rows of experts that saw no token are zero. None where importance was not measured.

    Raises:
        InputError: the directory is damaged.
    """
    if not (IMPORTANCE.measured(statistics) and statistics.holds(site, "abs_sum")):
        return None
    tokens = torch.tensor(statistics.metadata.sites[site].tokens, dtype=torch.float64)
    return statistics.tensor(site, "abs_sum").double() / tokens.clamp(min=1)[..., None]


def basis(statistics: Statistics, site: str) -> Tensor | None:
    """Return what is stored of an input's subspace: in × k, float32, orthonormal.

    None where there is none, on purpose or because subspaces were not measured.

    Raises:
        InputError: the directory is damaged.
    """
    record = next(w for w in statistics.matcher.weights.values() if w.site == site)
    if not SUBSPACE.measured(statistics):
        return None
    found = SUBSPACE.eigenpairs(statistics, record)
    return None if found is None else found[0]


def skew(values: Tensor) -> tuple[float, float]:
    """Return how unequal the channels of an input are.

    Args:
        values: ``(in,)`` or ``(experts, in)``, ≥ 0.

    Returns:
        The largest over the mean, and the share of the sum that the largest hundredth of the
        channels hold (at least one channel); of experts, of all rows that are not zero. 1 and
        the hundredth itself where all are alike, and for zeros.
    """
    rows = values.reshape(-1, values.shape[-1])
    rows = rows[rows.sum(-1) > 0]
    top = max(1, values.shape[-1] // 100)
    if not len(rows):
        return 1.0, top / values.shape[-1]
    peak = rows.amax(-1) / rows.mean(-1)
    held = rows.topk(top, -1).values.sum(-1) / rows.sum(-1)
    return float(peak.max()), float(held.max())
