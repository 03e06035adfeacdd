"""One ARM step with one weight: align, rotate, and step, a block of rows at a time.

For one weight ``W`` (out × in) of the current model, checkpoints ``W_i`` and an orthonormal basis
``U`` (in × k) of the layer's dominant input subspace::

    1  task vector   τ = W_i − W
    2  alignment     τ ← τ R_γ                 ``alignment.py``
    3  rotation      τ → τ', row by row        ``rotation.py``
    4  update        W + Σ η_i τ'_i

Numbers. Sums are taken in float32, in float64 where an input is float64. A row that float32 cannot
resolve is computed again in float64. On CUDA, float32 means what ``torch.backends.cuda.matmul``
lets it mean: with TF32 switched on (off by default) it is less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_arm.methods.alignment import Planes, align, principal_planes
from mergekit_arm.methods.rotation import rotate_rows, rotate_rows_precisely


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
    if steering.basis is None and steering.rates == (1,):
        # W + (W_c − W) is rounded; W_c is not.
        result.copy_(checkpoints[0])
        return
    for block, current, updated, task in _blocks(result, weight, steering.dtype):
        # −Σ η τ' first, and that from W at the end: W − W is +0 and x − (+0) is x for every x,
        # while x + (+0) would turn −0 into +0.
        _negative_update(current, [one[block] for one in checkpoints], steering, updated, task)
        torch.sub(current, updated, out=updated)


def _blocks(
    result: Tensor, weight: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield for each block its rows, W there, room for its result, and room for a task vector.

    All of ``dtype`` and contiguous. The first two are parts of ``weight`` and ``result`` where
    these are so already; otherwise they are working copies, the same memory for every block, and
    what was put into the result's is written back when the next block is asked for.
    """
    rows, width = weight.shape
    step = min(_block_rows(weight), rows)
    # Products of strided rows, and sums with them, are slow: copies are not.
    narrow = weight.dtype != dtype or not weight.is_contiguous()
    converted = result.dtype != dtype or not result.is_contiguous()
    # One allocation for all blocks: fresh pages cost a third of a step's time.
    scratch = weight.new_empty((1 + narrow + converted, step, width), dtype=dtype)
    for start in range(0, rows, max(step, 1)):
        block = slice(start, start + step)
        task, *copies = scratch[:, : min(step, rows - start)]
        current = copies.pop().copy_(weight[block]) if narrow else weight[block]
        updated = copies.pop() if converted else result[block]
        yield block, current, updated, task
        if converted:
            result[block] = updated


def _negative_update(
    current: Tensor,
    checkpoints: Sequence[Tensor],
    steering: _Steering,
    update: Tensor,
    task: Tensor,
) -> None:
    """Write −Σ η_i τ'_i of a block of rows into ``update``; ``task`` is room for one τ.

    What ``rotate_rows`` returns as coordinates in U adds up over the checkpoints, and is
    multiplied with Uᵀ once.
    """
    update.zero_()
    inside: Tensor | None = None
    for checkpoint, rate, planes in zip(checkpoints, steering.rates, steering.planes, strict=True):
        torch.sub(current, task.copy_(checkpoint), out=task)
        coordinates = None
        if steering.basis is not None:
            if planes is not None:
                task.copy_(align(task, planes))
            coordinates = _rotate(task, current, checkpoint, steering, planes)
        update.add_(task, alpha=rate)
        if coordinates is not None:
            coordinates *= rate
            inside = coordinates if inside is None else inside.add_(coordinates)
    if inside is not None:
        assert steering.basis is not None
        update.addmm_(inside, steering.basis.T)


def _rotate(
    task: Tensor, current: Tensor, checkpoint: Tensor, steering: _Steering, planes: Planes | None
) -> Tensor | None:
    """Rotate the rows ``task`` in place, but for the coordinates in U that are returned.

    A float64 task vector is rotated whole, and nothing is returned.
    """
    assert steering.basis is not None
    if steering.rotation == 0:
        return None
    if task.dtype == torch.float64:
        rotate_rows_precisely(task, steering.basis, steering.rotation)
        return None
    coordinates, resolved = rotate_rows(task, steering.basis, steering.rotation)
    # A few rows at a time, since float64 rows and their products are large beside the block.
    for rows in torch.split(resolved.logical_not_().nonzero()[:, 0], len(task) // 8 + 1):
        wide = current[rows].double() - checkpoint[rows].double()
        moved = wide.any(dim=1)
        if not moved.any():
            continue
        wide, rows = wide[moved], rows[moved]
        if planes is not None:
            wide = align(wide, planes)
        rotate_rows_precisely(wide, steering.basis, steering.rotation)
        task[rows], coordinates[rows] = wide.to(task.dtype), 0.0
    return coordinates


def _block_rows(weight: Tensor) -> int:
    """Return how many rows to take at once: few enough for their working copies to be small.

    A 32nd of the weight's bytes, in float32 numbers: three copies and what alignment adds stay
    below one copy of the weight. More rows at once would only use more memory; fewer, more time:
    dozens of operations on few numbers are mostly calls.
    """
    elements = min(1 << 23, max(weight.nbytes // 32, 3 << 15))
    return int(max(elements // max(weight.shape[1], 1), 1))
