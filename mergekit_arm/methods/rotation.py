"""Rotation, step 3 of an ARM step: turn rows towards a subspace, or away from it.

For a row τ of the task vector and an orthonormal basis ``U`` (in × k) of the subspace::

    τ = τ∥ + τ⊥,  τ∥ = τ U Uᵀ,  θ = atan2(‖τ⊥‖, ‖τ∥‖)
    θ' = θ (1 − ρ)                ρ ≥ 0: towards the subspace
    θ' = θ + |ρ| (π/2 − θ)        ρ ≤ 0: away from it
    τ' = ‖τ‖ (cos θ' · τ∥/‖τ∥ + sin θ' · τ⊥/‖τ⊥‖)

The row keeps its length. Two functions compute the same: ``rotate_rows`` in float32, with two
products of the rows with ``U`` and a warning about rows that float32 cannot resolve, and
``rotate_rows_precisely`` in float64. Angles are always taken in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STRAIGHT = 1e-6
"""A row keeps its direction where its part inside or outside the subspace is below this share of
its length: such a part is rounding, and turning would blow it up to full length."""

ENLARGED = 2**8
"""A row whose inside part would grow by more than this factor goes to float64. float32 knows the
part to about 1e-7 of the row's length, and that error grows by the same factor."""

SMALL_OUTSIDE = 2**-3
"""A row with less than this share of its length outside the subspace goes to float64: the outside
length is the root of a difference of two squares, which cancel when it is small."""

SMALLEST = 1e-12
"""A row shorter than this goes to float64: the squares of its entries underflow in float32."""


def rotate_rows(task: Tensor, basis: Tensor, rotation: float) -> tuple[Tensor, Tensor]:
    """Turn rows in float32, leaving the product with Uᵀ to the caller.

    With a and b the factors of τ∥ and τ⊥ in the equation above, a turned row is::

        τ' = a τ∥ + b τ⊥ = b τ + (a − b) τ U Uᵀ

    ``task`` is overwritten with its first term b τ; the coefficients (a − b) τ U of the second are
    returned. The caller multiplies them with Uᵀ, once for the sum over all checkpoints. τ⊥ is
    never formed, since ‖τ⊥‖² = ‖τ‖² − ‖τ U‖².

    A row keeps its direction (a = b = 1) where it is zero, or where its part inside or outside
    the subspace is under ``STRAIGHT`` of its length.

    Args:
        task: τ, rows × in, float32; overwritten.
        basis: U, in × k, float32, orthonormal columns.
        rotation: ρ in [−1, 1].

    Returns:
        The coefficients, rows × k, float32; and for every row, whether float32 resolves it
        (bool). Where that is False, as for zero rows, both terms may be wrong: use
        ``rotate_rows_precisely`` there.
    """
    coordinates = task @ basis
    inside = torch.linalg.vector_norm(coordinates, dim=-1).double()
    norm = torch.linalg.vector_norm(task, dim=-1).double()
    outside = (norm.square() - inside.square()).clamp_(min=0).sqrt_()
    along, across = _factors(inside, outside, norm, rotation)
    resolved = (norm > SMALLEST) & (along < ENLARGED) & (outside > SMALL_OUTSIDE * norm)
    task.mul_(across[:, None].float())
    return coordinates.mul_((along - across)[:, None].float()), resolved


def rotate_rows_precisely(task: Tensor, basis: Tensor, rotation: float) -> None:
    """Turn ``task`` (rows × in, float64) into τ' in place; ``basis`` is U in any precision.

    Holds two more copies of the rows, and a float64 copy of the basis.
    """
    basis = basis.to(task.dtype)
    coordinates = task @ basis
    parallel = coordinates @ basis.T
    orthogonal = task.sub_(parallel)
    # A basis stored in float32 is orthonormal to 1e-7 only. Projecting twice squares that
    # error, which a small part enlarged to full length would otherwise show.
    again = orthogonal @ basis
    coordinates += again
    parallel.addmm_(again, basis.T)
    orthogonal.addmm_(again, basis.T, alpha=-1)
    inside = torch.linalg.vector_norm(coordinates, dim=-1)
    outside = torch.linalg.vector_norm(orthogonal, dim=-1)
    along, across = _factors(inside, outside, torch.hypot(inside, outside), rotation)
    orthogonal.mul_(across[:, None])
    task.addcmul_(parallel, along[:, None])


def _factors(
    inside: Tensor, outside: Tensor, norm: Tensor, rotation: float
) -> tuple[Tensor, Tensor]:
    """Return what τ∥ and τ⊥ are multiplied by: step 3's ‖τ‖ cos θ'/‖τ∥‖, ‖τ‖ sin θ'/‖τ⊥‖."""
    angle = torch.atan2(outside, inside)
    goal = 0.0 if rotation >= 0 else math.pi / 2
    angle = angle + abs(rotation) * (goal - angle)
    straight = (torch.minimum(inside, outside) < STRAIGHT * norm) | (norm == 0)
    along = torch.where(straight, 1.0, norm * angle.cos() / inside)
    across = torch.where(straight, 1.0, norm * angle.sin() / outside)
    return along, across
