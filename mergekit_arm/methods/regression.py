"""RegMean (Jin et al., arXiv 2212.09849) relative to a base: one weight.

    W ← W + λ x        x: the change nearest to every model's own on that model's inputs, in what
                       the layer puts out (``moments.py`` has the equation)

Without a base, a ridge or shrunk moments that is RegMean's own W = (Σ G_i)⁻¹ Σ G_i W_i: there W
cancels. Relative to a base, directions that no model's inputs reach keep what the base has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_arm.methods.moments import LeastSquares
from mergekit_arm.methods.rows import row_blocks, working_dtype


@torch.no_grad()
def regression_step(
    weight: Tensor,
    checkpoints: Sequence[Tensor],
    solution: LeastSquares,
    *,
    scale: float = 1.0,
    input_axis: int = -1,
) -> Tensor:
    """Return W + λ x, a new tensor of ``weight``'s shape, dtype and device.

    A row in which every checkpoint equals W stays W, bit for bit. Arithmetic in float32, or
    float64 where a tensor is float64.

    Holds the result and one working copy of a block of rows more than there are checkpoints
    (``rows.py``), and rows × K numbers; ``solution`` again only where it is on another device.

    Args:
        weight: W; one of fewer than two dimensions takes ``plain_average``.
        checkpoints: W_i, of W's shape, in any floating-point dtype, in ``solution``'s order.
        solution: from ``least_squares`` or ``plain_average``.
        scale: λ.
        input_axis: the axis of W that counts inputs: the last, or the one before it for
            weights stored in × out.

    Raises:
        ValueError: shapes or numbers of things that do not fit.
    """
    solution.check(len(checkpoints), weight, input_axis)
    solution = solution.to(weight.device, working_dtype(weight, *checkpoints))
    if scale == 0:
        return weight.clone(memory_format=torch.contiguous_format)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for rows in row_blocks(result, weight, checkpoints, input_axis=input_axis):
        update = solution.of_expert(rows.expert).solve(rows.tasks, out=rows.spares[0])
        rows.write(update, scale)
    return result
