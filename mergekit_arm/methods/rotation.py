"""ARM, the kernel: turn a task vector relative to an activation subspace, then step along it.

For one weight ``W`` (out × in) of the current model, a checkpoint's ``W_c`` and an orthonormal
basis ``U`` (in × k) of the layer's dominant input subspace::

    1  task vector   τ = W_c − W
    2  alignment     τ ← τ R_γ          the direct rotation that carries span U_c (the checkpoint's
                                        subspace) to span U, every principal angle scaled by γ
    3  rotation      row by row         τ = τ∥ + τ⊥,  τ∥ = τ U Uᵀ,  θ = atan2(‖τ⊥‖, ‖τ∥‖)
                     θ' = θ (1 − ρ)                ρ ≥ 0: towards the subspace
                     θ' = θ + |ρ| (π/2 − θ)        ρ ≤ 0: away from it
                     τ' = ‖τ‖ (cos θ' · τ∥/‖τ∥ + sin θ' · τ⊥/‖τ⊥‖)
    4  update        W + η τ'

Several checkpoints' updates add: W + Σ η_i τ'_i. Nothing here is ever in × in: every product is
of a block of rows with an in × k basis.

Numbers. Sums are taken in float32, in float64 where an input is float64; angles always in
float64. A row with a part inside or outside the subspace so small that float32 would hold too few
of its digits is computed again in float64. On CUDA, float32 means what
``torch.backends.cuda.matmul`` lets it mean: with TF32 switched on (off by default) it is less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRAIGHT = 1e-6
"""Rows keep their direction where a part's share of the norm is below this."""

ENLARGED = 2**8
"""Rows with a part that grows by more than this are computed again in float64: errors of float32,
about 1e-7 of the row, grow with it."""

SMALL_OUTSIDE = 2**-3
"""The same for rows with a smaller share outside: the root of a difference of squares."""

SMALLEST = 1e-12
"""Rows of a norm below this lose squares to float32's underflow; they go to float64 too."""


@dataclass(frozen=True)
class Incoming:
    """One checkpoint of a step.

    ``learning_rate`` is η; 0 leaves the checkpoint out. ``basis`` is U_c (in × k_c, orthonormal
    columns), needed where the step aligns.
    """

    checkpoint: Tensor
    learning_rate: float
    basis: Tensor | None = None


@torch.no_grad()
def arm_step(
    weight: Tensor,
    incoming: Sequence[Incoming],
    basis: Tensor | None,
    *,
    rotation: float,
    alignment: float = 0.0,
    input_axis: int = -1,
) -> Tensor:
    """Return W + Σ η_i τ'_i, a new tensor of ``weight``'s shape, dtype and device.

    Plain task arithmetic, W + Σ η_i τ_i, where a rotation has no meaning: tensors with fewer
    than two dimensions, ``basis`` None, without columns or with as many as inputs, and
    ρ = γ = 0. There a single checkpoint at η = 1 gives W_c itself. A row in which every
    checkpoint equals W stays W, bit for bit, at any setting.

    Extra memory: the result, and working copies of a block of rows that come to less than
    another copy of the weight (or 2 MiB, if that is more); where rows need float64 (see the
    module's notes), a float64 copy of the bases too.

    Args:
        weight: W; floating point, any number of dimensions. Of three or more, the leading ones
            count experts that share the basis.
        incoming: the checkpoints, of W's shape, in any floating-point dtype.
        basis: U, in × k, columns orthonormal to working precision.
        rotation: ρ in [−1, 1].
        alignment: γ in [0, 1]; above 0 every checkpoint needs its basis.
        input_axis: the axis of W that counts inputs: the last, or the one before it for
            weights stored in × out.

    Raises:
        ValueError: a shape, a range, or a missing basis.
    """
    incoming = [item for item in incoming if item.learning_rate != 0]
    steering = _steering(weight, incoming, basis, rotation, alignment, input_axis)
    result = torch.empty_like(weight)
    tensors = [result, weight, *(item.checkpoint for item in incoming)]
    if weight.ndim < 2:
        tensors = [tensor.reshape(1, -1) for tensor in tensors]
    elif steering.basis is not None:
        tensors = [tensor.movedim(input_axis, -1) for tensor in tensors]
    _step(tensors[0], tensors[1], tensors[2:], steering)
    return result


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


def rotate_rows(task: Tensor, basis: Tensor, rotation: float) -> tuple[Tensor, Tensor]:
    """Split the turned rows τ' = b τ + (a − b) τ U Uᵀ of ``task`` (rows × in, float32).

    a and b are the factors of τ∥ and τ⊥ in step 3. τ⊥ is never formed, since
    ‖τ⊥‖² = ‖τ‖² − ‖τ U‖². ``task`` becomes b τ. Returned are (a − b) τ U, rows × k, which adds
    up over checkpoints and needs one product with Uᵀ for all of them, and the rows (bool) that
    float32 resolves, where the two are right. Zeros are not among these.

    A row of zeros, and one whose part inside or outside span U is under ``STRAIGHT`` of its
    norm, keeps its direction.

    Args:
        task: τ.
        basis: U, in × k, float32.
        rotation: ρ.
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
    """Turn rows ``task`` (rows × in, float64) into τ', in place; see ``rotate_rows``."""
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


@dataclass(frozen=True)
class _Steering:
    """What all rows of a step share; without a basis the step is plain task arithmetic."""

    rates: tuple[float, ...]
    basis: Tensor | None
    rotation: float
    planes: tuple[Planes | None, ...]
    dtype: torch.dtype


def _steering(
    weight: Tensor,
    incoming: Sequence[Incoming],
    basis: Tensor | None,
    rotation: float,
    alignment: float,
    input_axis: int,
) -> _Steering:
    if not -1 <= rotation <= 1:
        raise ValueError(f"rotation must lie in [-1, 1], got {rotation}")
    if not 0 <= alignment <= 1:
        raise ValueError(f"alignment must lie in [0, 1], got {alignment}")
    if any(item.checkpoint.shape != weight.shape for item in incoming):
        shapes = [tuple(item.checkpoint.shape) for item in incoming]
        raise ValueError(f"checkpoints have shapes {shapes}, the weight {tuple(weight.shape)}")
    tensors = [weight, *(item.checkpoint for item in incoming)]
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if wide else torch.float32
    rates = tuple(item.learning_rate for item in incoming)
    neutral = _Steering(rates, None, 0.0, tuple(None for _ in incoming), dtype)
    if weight.ndim < 2 or basis is None or rotation == alignment == 0:
        return neutral
    if input_axis % weight.ndim < weight.ndim - 2:
        raise ValueError(f"input_axis must be one of the last two, got {input_axis}")
    width = weight.shape[input_axis]
    for one in (basis, *(item.basis for item in incoming if item.basis is not None)):
        if one.ndim != 2 or one.shape[0] != width:
            raise ValueError(f"the weight has {width} inputs, a basis shape {tuple(one.shape)}")
    if not 0 < basis.shape[1] < width:
        return neutral
    basis = basis.to(dtype)
    planes: list[Planes | None] = []
    for item in incoming:
        if alignment == 0:
            planes.append(None)
            continue
        if item.basis is None:
            raise ValueError("alignment above 0 needs the basis of every checkpoint")
        planes.append(principal_planes(basis, item.basis.to(dtype), alignment))
    return _Steering(rates, basis, rotation, tuple(planes), dtype)


def _step(
    result: Tensor, weight: Tensor, checkpoints: Sequence[Tensor], steering: _Steering
) -> None:
    """Write the step into ``result``; all tensors are (…, rows, in), of any layout."""
    if weight.ndim > 2:
        for index in range(weight.shape[0]):
            _step(result[index], weight[index], [one[index] for one in checkpoints], steering)
        return
    rows, width = weight.shape
    step = min(_block_rows(weight), rows)
    # Products of strided rows, and sums with them, are slow: copies are not.
    narrow = weight.dtype != steering.dtype or not weight.is_contiguous()
    converted = result.dtype != steering.dtype or not result.is_contiguous()
    # One allocation for all blocks: fresh pages cost a third of a step's time.
    scratch = weight.new_empty((1 + narrow + converted, step, width), dtype=steering.dtype)
    for start in range(0, rows, max(step, 1)):
        block = slice(start, start + step)
        turned, *copies = scratch[:, : min(step, rows - start)]
        current = copies.pop().copy_(weight[block]) if narrow else weight[block]
        updated = copies.pop() if converted else result[block]
        if steering.basis is None and steering.rates == (1,):
            # W + (W_c − W) is rounded; W_c is not.
            result[block] = checkpoints[0][block]
            continue
        # −Σ η τ' first, and that from W at the end: W − W is +0 and x − (+0) is x for every x,
        # while x + (+0) would turn −0 into +0.
        updated.zero_()
        inside: Tensor | None = None
        for one, rate, planes in zip(checkpoints, steering.rates, steering.planes, strict=True):
            coordinates = _turn(current, one[block], steering, planes, turned)
            updated.add_(turned, alpha=rate)
            if coordinates is not None:
                coordinates *= rate
                inside = coordinates if inside is None else inside.add_(coordinates)
        if inside is not None:
            assert steering.basis is not None
            updated.addmm_(inside, steering.basis.T)
        torch.sub(current, updated, out=updated)
        if converted:
            result[block] = updated


def _turn(
    current: Tensor, checkpoint: Tensor, steering: _Steering, planes: Planes | None, turned: Tensor
) -> Tensor | None:
    """Write −τ' of a block of rows into ``turned``, less what coordinates in U are returned for."""
    torch.sub(current, turned.copy_(checkpoint), out=turned)
    if steering.basis is None:
        return None
    if planes is not None:
        turned.copy_(align(turned, planes))
    if steering.rotation == 0:
        return None
    if turned.dtype == torch.float64:
        rotate_rows_precisely(turned, steering.basis, steering.rotation)
        return None
    coordinates, resolved = rotate_rows(turned, steering.basis, steering.rotation)
    # A few rows at a time, since float64 rows and their products are large beside the block.
    for rows in torch.split(resolved.logical_not_().nonzero()[:, 0], len(turned) // 8 + 1):
        wide = current[rows].double() - checkpoint[rows].double()
        moved = wide.any(dim=1)
        if not moved.any():
            continue
        wide, rows = wide[moved], rows[moved]
        if planes is not None:
            wide = align(wide, planes)
        rotate_rows_precisely(wide, steering.basis, steering.rotation)
        turned[rows], coordinates[rows] = wide.to(turned.dtype), 0.0
    return coordinates


def _block_rows(weight: Tensor) -> int:
    """Return how many rows to take at once: few enough for their working copies to be small.

    A 32nd of the weight's bytes, in float32 numbers: three copies and what alignment adds stay
    below one copy of the weight. More rows at once would only use more memory; fewer, more time:
    dozens of operations on few numbers are mostly calls.
    """
    elements = min(1 << 23, max(weight.nbytes // 32, 3 << 15))
    return int(max(elements // max(weight.shape[1], 1), 1))
