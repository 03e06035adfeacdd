"""Alignment, step 2 of an ARM step: carry the checkpoint's subspace to the current model's.

The direct rotation from span U_c to span U turns in planes, one for every principal angle between
the two, and leaves everything orthogonal to both where it is. ARM turns by a share γ of each::

    P cos Θ Qᵀ = svd(U_cᵀ U)        principal vectors p = U_c P and q = U Q, angles Θ
    τ ← τ R_γ                       R_γ turns each p by γθ towards its q

No in × in matrix is formed: every product is of rows with an in × k basis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Planes:
    """The planes in which alignment turns, from P cos Θ Qᵀ = svd(U_cᵀ U), m = min(k_c, k).

    Columns of U_c · ``to_p`` and U · ``to_q`` are the principal vectors p and q (``to_p`` is
    k_c × m, ``to_q`` k × m); ``first`` = sin γθ / sin θ and ``second`` = (1 − cos γθ) / sin² θ
    are the coefficients of A and A² in ``align``. All float64 but the bases.
    """

    basis: Tensor
    checkpoint_basis: Tensor
    to_p: Tensor
    to_q: Tensor
    cos: Tensor
    first: Tensor
    second: Tensor


def principal_planes(basis: Tensor, checkpoint_basis: Tensor, alignment: float) -> Planes:
    """Return the planes of the direct rotation from span U_c to span U, angles scaled by γ."""
    # Near-orthogonal pairs are told apart by their small cosines: these need float64, which is
    # taken in blocks so that no basis is copied whole.
    overlap = sum(
        (one.double().T @ other.double())
        for one, other in zip(
            torch.split(checkpoint_basis, 1024), torch.split(basis, 1024), strict=True
        )
    )
    assert isinstance(overlap, Tensor)
    to_p, cos, to_q = torch.linalg.svd(overlap, full_matrices=False)
    cos = cos.clamp(max=1.0)
    angle = cos.arccos()
    # sin γθ / sin θ and 2 sin²(γθ/2) / sin² θ, through sin x = x · sinc(x/π): no 0/0 at θ = 0.
    sinc = torch.sinc(angle / math.pi)
    first = alignment * torch.sinc(alignment * angle / math.pi) / sinc
    second = (alignment * torch.sinc(alignment * angle / (2 * math.pi)) / sinc).square() / 2
    return Planes(basis, checkpoint_basis, to_p, to_q.T, cos, first, second)


def align(task: Tensor, planes: Planes) -> Tensor:
    """Return τ R_γ for rows ``task`` (rows × in): step 2.

    In the plane of the principal vectors p of span U_c and q of span U, at angle θ, the turn by
    φ = γθ from p towards q is, with A = (q pᵀ − p qᵀ) / sin θ::

        I + sin φ · A + (1 − cos φ) · A²      A² = (cos θ (q pᵀ + p qᵀ) − p pᵀ − q qᵀ) / sin² θ

    so τ gains multiples of p and q, made from τ·p and τ·q, whose coefficients stay bounded as
    θ → 0. Where θ = π/2 for several pairs the direct rotation is not unique; one is taken.
    """
    dtype = task.dtype
    start, end = planes.checkpoint_basis.to(dtype), planes.basis.to(dtype)
    to_p, to_q, cos = planes.to_p.to(dtype), planes.to_q.to(dtype), planes.cos.to(dtype)
    first, second = planes.first.to(dtype), planes.second.to(dtype)
    p, q = task @ start @ to_p, task @ end @ to_q
    along_p = second * (cos * q - p) - first * q
    along_q = second * (cos * p - q) + first * p
    return task + (along_p @ to_p.T) @ start.T + (along_q @ to_q.T) @ end.T
