"""ARM's step that does not forget: follow the checkpoint on the task's inputs, stay on all others.

For one weight W of the current model, a checkpoint's W_c, and second moments of the layer's inputs
in the current model, C̃_t on the task's text and C̃_g on general text::

    τ  = W_c − W
    d  = τ C̃_t (C̃_t + κ C̃_g)⁻¹    least squares between following and staying (``moments.py``)
    τ' = τ turned towards d, row by row, by the part s of the angle between them; ‖τ'‖ = ‖τ‖
    W  ← W + η τ'

s = 1 gives ‖τ‖ d/‖d‖, s = 0 task arithmetic. Between them the row moves along the arc, its angle
in proportion to s, as ARM's rotation does; a straight line between the two, made as long as τ
again, would move fast in the middle. Only positive eigenvalues lead from τ to d, so that d is
never opposite to τ and there is always one shortest arc.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_arm.methods.moments import LeastSquares, SecondMoment, least_squares
from mergekit_arm.methods.rotation import SMALLEST
from mergekit_arm.methods.rows import few_rows, row_blocks, working_dtype
from mergekit_arm.methods.step import Incoming, arm_step

NOTHING_LEFT = 1e-6
"""A row keeps its direction where less than this part of what is usually left of one is left."""


@dataclass(frozen=True)
class Retention:
    """The map from τ to d, and what is usually left of a row.

    ``gain``: tr C̃_t / (tr C̃_t + κ tr C̃_g), float64, of no dimension or (experts,).
    """

    solution: LeastSquares
    gain: Tensor


def retention(task: SecondMoment, general: SecondMoment, *, retain: float) -> Retention:
    """Return the map from τ to d = τ C̃_t (C̃_t + κ C̃_g)⁻¹, for every weight of one site.

    Channels that neither text excites stay as they are (d = 0); so do, up to rounding,
    directions. Where nothing at all was measured, d = τ. See ``least_squares`` for what it holds.

    Args:
        task: C̃_t.
        general: C̃_g, of the same shape.
        retain: κ ≥ 0; at 0 d is τ on all that the task excites.

    Raises:
        ValueError: shapes or ranges.
    """
    solution = least_squares([task], [1.0], anchor=general, retain=retain)
    followed = task.diagonal.sum(-1)
    whole = followed + retain * general.diagonal.sum(-1)
    return Retention(solution, followed / torch.where(whole > 0, whole, 1.0))


@torch.no_grad()
def retaining_step(
    weight: Tensor,
    incoming: Sequence[Incoming],
    towards: Retention | None,
    *,
    turn: float = 1.0,
    input_axis: int = -1,
) -> tuple[Tensor, int]:
    """Return W + Σ η_i τ'_i, and how many rows kept their direction because nothing was left.

    The first is a new tensor of ``weight``'s shape, dtype and device: task arithmetic exactly
    where s = 0, for tensors of fewer than two dimensions, and without a ``Retention``. A row in
    which every checkpoint equals W stays W, bit for bit. The second counts a row once for each
    checkpoint, and no row of zeros.

    Arithmetic in float32, or float64 where a tensor is float64. Holds the result, three working
    copies of a block of rows more than there are checkpoints (``rows.py``), and rows × K numbers.

    Args:
        weight: W.
        incoming: the checkpoints, of W's shape; their bases are not used.
        towards: from ``retention``.
        turn: s in [0, 1].
        input_axis: the axis of W that counts inputs: the last, or the one before it for
            weights stored in × out.

    Raises:
        ValueError: shapes, a range, or numbers of things that do not fit.
    """
    if not 0 <= turn <= 1:
        raise ValueError(f"turn must lie in [0, 1], got {turn}")
    incoming = [item for item in incoming if item.learning_rate != 0]
    if turn == 0 or weight.ndim < 2 or towards is None or not incoming:
        return arm_step(weight, incoming, None, rotation=0.0), 0
    checkpoints = [item.checkpoint for item in incoming]
    towards.solution.check(1, weight, input_axis)
    solution = towards.solution.to(weight.device, working_dtype(weight, *checkpoints))
    gains = towards.gain.to(weight.device).expand(weight.shape[0] if weight.ndim == 3 else 1)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    count = 0
    for rows in row_blocks(result, weight, checkpoints, input_axis=input_axis, spares=3):
        goal, copy, update = rows.spares
        update.zero_()
        here = solution.of_expert(rows.expert)
        for item, task in zip(incoming, rows.tasks, strict=True):
            here.solve([copy.copy_(task)], out=goal)
            rate, gain = item.learning_rate, gains[rows.expert]
            for few in few_rows(task):
                ahead, across, kept = _turned(task[few], goal[few], copy[few], gain, turn)
                count += int(kept.sum())
                update[few].addcmul_(goal[few], (rate * across).to(task.dtype)[:, None])
                if bool(ahead.any()):
                    update[few].addcmul_(task[few], (rate * ahead).to(task.dtype)[:, None])
        rows.write(update)
    return result, count


def _turned(
    task: Tensor, goal: Tensor, spare: Tensor, gain: Tensor, turn: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a and b of τ' = a τ + b d for every row, and which rows have nothing left.

    With θ the angle between them, a = sin((1 − s) θ) / sin θ and b = ‖τ‖/‖d‖ · sin(s θ) / sin θ.
    """
    length, reach, cosine = _angles(task, goal, spare, needed=turn < 1)
    nothing = reach <= NOTHING_LEFT * gain * length
    straight = nothing | (length == 0)
    # Through sin x = x · sinc(x/π): no 0/0 at θ = 0. An error in cos θ is as small in both.
    angle = cosine.clamp(-1, 1).arccos() / math.pi
    sinc, rest = torch.sinc(angle), 1 - turn
    ahead = rest * torch.sinc(rest * angle) / sinc
    across = turn * torch.sinc(turn * angle) / sinc * length / reach
    ahead, across = torch.where(straight, 1.0, ahead), torch.where(straight, 0.0, across)
    return ahead, across, nothing & (length > 0)


def _angles(
    task: Tensor, goal: Tensor, spare: Tensor, *, needed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ‖τ‖, ‖d‖ and cos θ of every row, in float64; 1 for the last where it isn't needed."""

    def measure(one: Tensor, other: Tensor, spare: Tensor) -> list[Tensor]:
        length, reach = (torch.linalg.vector_norm(row, dim=1).double() for row in (one, other))
        if not needed:
            return [length, reach, torch.ones_like(length)]
        product = torch.mul(one, other, out=spare).sum(1).double()
        return [length, reach, product / (length * reach)]

    found = measure(task, goal, spare)
    # Squares of small numbers underflow in float32. A few rows at a time, as float64 is large.
    small = (torch.minimum(found[0], found[1]) < SMALLEST).nonzero()[:, 0]
    for rows in torch.split(small, len(task) // 8 + 1):
        wide = task[rows].double()
        for one, again in zip(
            found, measure(wide, goal[rows].double(), torch.empty_like(wide)), strict=True
        ):
            one[rows] = again
    return found[0], found[1], found[2]
