"""A few rows of a weight at a time, as task vectors: what a step holds beside its result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A block of rows of one matrix, in working copies that may be overwritten.

    ``tasks``: W − W_i, the task vectors *negated*, rows × in each. ``spares``: as many more
    copies as were asked for, of undefined content. ``expert``: the index on the leading axis of
    a weight of three dimensions, else 0.
    """

    expert: int
    tasks: list[Tensor]
    spares: list[Tensor]
    _weight: Tensor
    _result: Tensor

    def write(self, update: Tensor, scale: float = 1.0) -> None:
        """Write W − scale · ``update`` into the result, from a copy that is not ``tasks[0]``.

        Where ``update`` is zero that is W, bit for bit: W − (+0) is W for every W, −0 included,
        as W + (+0) is not. That is why task vectors are negated.
        """
        for few in few_rows(update):
            current = self.tasks[0][few].copy_(self._weight[few])
            self._result[few] = current.sub_(update[few], alpha=scale)


def row_blocks(
    result: Tensor,
    weight: Tensor,
    checkpoints: Sequence[Tensor],
    *,
    input_axis: int = -1,
    spares: int = 1,
) -> Iterator[Rows]:
    """Go through the rows of ``weight``: (out, in) or (experts, out, in), or less, as one row.

    Holds a working copy of the block for every checkpoint and spare, at most a 16th of the
    weight's numbers each, or half a MiB where that is more; float32, or float64 where a tensor is.

    Args:
        result: what ``Rows.write`` writes to; of W's shape, not W itself.
        weight: W.
        checkpoints: W_i, at least one, of W's shape, in any floating-point dtype.
        input_axis: the axis of W that counts inputs: one of the last two.
        spares: working copies besides, at least 1.

    Raises:
        ValueError: shapes that differ, more than three dimensions, or another input axis.
    """
    shapes = [tuple(one.shape) for one in checkpoints]
    if any(shape != weight.shape for shape in shapes):
        raise ValueError(f"checkpoints have shapes {shapes}, the weight {tuple(weight.shape)}")
    if weight.ndim > 3 or (weight.ndim > 1 and input_axis % weight.ndim < weight.ndim - 2):
        raise ValueError(
            f"the inputs must be one of the last two of at most three axes, got {input_axis} of "
            f"{weight.ndim}"
        )
    if weight.numel() == 0:
        return
    views = [_experts(one, input_axis) for one in (result, weight, *checkpoints)]
    experts, rows, width = views[0].shape
    step = min(max(_numbers_at_once(weight) // width, 1), rows)
    shape = (spares + len(checkpoints), step, width)
    scratch = weight.new_empty(shape, dtype=working_dtype(weight, *checkpoints))
    for expert in range(experts):
        for start in range(0, rows, step):
            into, current, *others = [one[expert, start : start + step] for one in views]
            copies = list(scratch[:, : len(current)])
            free, tasks = copies[:spares], copies[spares:]
            for few in few_rows(free[0]):
                here = free[0][few].copy_(current[few])
                for task, other in zip(tasks, others, strict=True):
                    torch.sub(here, task[few].copy_(other[few]), out=task[few])
            yield Rows(expert, tasks, free, current, into)


def few_rows(matrix: Tensor) -> Iterator[slice]:
    """Split rows into parts that stay in a processor's cache from one operation to the next.

    Products want many rows at once; everything else waits for memory where it takes as many.
    """
    step = max((1 << 17) // max(matrix.shape[1], 1), 1)
    return (slice(start, start + step) for start in range(0, matrix.shape[0], step))


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float32, or float64 where a tensor is float64."""
    wide = any(one.dtype == torch.float64 for one in tensors)
    return torch.float64 if wide else torch.float32


def _experts(tensor: Tensor, input_axis: int) -> Tensor:
    """Return a view of the shape (experts, rows, in)."""
    if tensor.ndim < 2:
        return tensor.reshape(1, 1, -1)
    moved = tensor.movedim(input_axis, -1)
    return moved if tensor.ndim == 3 else moved[None]


def _numbers_at_once(weight: Tensor) -> int:
    # Products of fewer than a few hundred rows would wait for memory; 4 M numbers are 16 MiB.
    return int(min(max(weight.numel() // 16, 1 << 17), 1 << 22))
