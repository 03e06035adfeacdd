"""Second moments of a layer's inputs, low rank plus diagonal, and least squares under them.

What is published of C = E[x xᵀ] is its diagonal d and its leading eigenpairs U, Λ. From these::

    C ≈ U Λ Uᵀ + diag(d − diag(U Λ Uᵀ))
    C̃ = α C + (1 − α) diag C  =  B Bᵀ + diag(e)         B: in × k, e ≥ 0

Given changes τ_i (rows × in) of one weight, each right for inputs with second moment C̃_i, the
change that comes nearest to all of them in what the layer puts out, row by row::

    x = argmin Σ w_i ‖(x − τ_i) C̃_i^½‖² + κ ‖x C̃_0^½‖² + ε ‖x‖²
      = Σ w_i τ_i C̃_i A⁻¹          A = Σ w_i C̃_i + κ C̃_0 + ε I

C̃_0 belongs to the model that is changed, whose own τ is zero. With D = Σ w_i e_i + κ e_0 + ε and
m = Σ w_i τ_i e_i / D, the answer from the diagonals alone::

    x = m + Σ w_i (τ_i − m) B_i B_iᵀ A⁻¹ − κ m B_0 B_0ᵀ A⁻¹

which is exact, and has no difference of large numbers: where the models agree, nothing is added
to m. Of A⁻¹ only the products A⁻¹ B_i are needed, by Woodbury's identity with K = Σ k_i
columns: nothing is in × in unless K is no smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_arm.methods.rows import few_rows

SMALLEST_REMAINDER = 2.0**-20
"""A smaller part of a channel's energy outside the leading eigenvectors is rounding, and none."""

SMALLEST_PIVOT = 2.0**-23
"""D is at least this part of A's diagonal, so that A can be inverted: float32's own rounding."""

_CHANNELS = 2048
"""Rows of B that are in float64 at once."""


@dataclass(frozen=True)
class SecondMoment:
    """C̃ = B Bᵀ + diag(e), positive definite on the channels that were excited at all.

    ``diagonal``: its diagonal, (in,) or (experts, in), float64. ``remainder``: e, the same shape.
    ``factor``: B, in × k, or None where the moment is diagonal.
    """

    diagonal: Tensor
    remainder: Tensor
    factor: Tensor | None = None


def second_moment(
    diagonal: Tensor,
    basis: Tensor | None = None,
    eigenvalues: Tensor | None = None,
    *,
    alpha: float = 0.9,
) -> SecondMoment:
    """Return C̃ = α C + (1 − α) diag C of a site.

    The eigenpairs may be of a sample of the tokens that the diagonal is of, and the basis may be
    rounded: in some channels U Λ Uᵀ then holds more energy than d. There the diagonal, which is
    of more tokens, is kept, and the channel's row of U Λ^½ is scaled down to it, as if its inputs
    had been smaller: the correlations stay and the matrix remains positive semidefinite. A
    channel with d = 0 has no row at all.

    Holds B, of float32 (float64 for a float64 basis), and vectors of float64.

    Args:
        diagonal: d = Σx² / n ≥ 0, (in,), or (experts, in) without a basis.
        basis: U, in × k, orthonormal columns; None or no columns for a diagonal moment.
        eigenvalues: Λ ≥ 0, (k,), of x xᵀ averaged over tokens.
        alpha: α in [0, 1]; 0 leaves the diagonal alone.

    Raises:
        ValueError: a shape or range, or a number that is negative or not finite.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    diagonal = _checked(diagonal, "diagonal")
    if basis is None or eigenvalues is None or basis.shape[-1] == 0 or alpha == 0:
        return SecondMoment(diagonal, diagonal)
    if basis.ndim != 2 or basis.shape != (*diagonal.shape, *eigenvalues.shape):
        shapes = [tuple(one.shape) for one in (diagonal, basis, eigenvalues)]
        raise ValueError(f"a diagonal, basis and eigenvalues of shapes {shapes} do not fit")
    dtype = torch.float64 if basis.dtype == torch.float64 else torch.float32
    factor = basis.to(dtype) * (alpha * _checked(eigenvalues, "eigenvalues")).sqrt().to(dtype)
    low_rank = _row_energies(factor)
    excess = low_rank > alpha * diagonal
    factor[excess] *= (alpha * diagonal / low_rank)[excess].sqrt().to(dtype)[:, None]
    remainder = diagonal - _row_energies(factor)
    remainder = torch.where(remainder > SMALLEST_REMAINDER * diagonal, remainder, 0.0)
    return SecondMoment(diagonal, remainder, factor)


@dataclass(frozen=True)
class LeastSquares:
    """The map from task vectors τ_i to x, ready for any number of rows.

    ``shares``: w_i e_i / D, (n, in), (n, experts, in), or (n, 1) where all channels are alike.
    ``factors``: B_i, in the order of the tasks, then the base's; None where there is none.
    ``back``: K × in, the products (w_i A⁻¹ B_i)ᵀ, one below the other; None where K = 0.

    Weights that read the same input can share one. Making it takes as many operations, in
    float64, as applying it to K rows does in float32.
    """

    shares: Tensor
    factors: tuple[Tensor | None, ...]
    back: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> LeastSquares:
        """Return the same with numbers of ``dtype`` on ``device``; shares memory where it can."""
        return LeastSquares(
            self.shares.to(device, dtype),
            tuple(None if one is None else one.to(device, dtype) for one in self.factors),
            None if self.back is None else self.back.to(device, dtype),
        )

    def check(self, tasks: int, weight: Tensor, input_axis: int) -> None:
        """Check that this map is for ``tasks`` task vectors of ``weight``.

        Raises:
            ValueError: it is for another number of them, another width, or other experts.
        """
        experts = [weight.shape[0]] if self.shares.ndim == 3 else []
        width = weight.shape[input_axis] if weight.ndim > 1 else weight.numel()
        wanted = [tasks, *experts, width if self.shares.shape[-1] > 1 else 1]
        if list(self.shares.shape) != wanted or (experts and weight.ndim != 3):
            raise ValueError(
                f"least squares for tasks, experts and inputs of {tuple(self.shares.shape)}, and "
                f"{tasks} tasks of a weight of shape {tuple(weight.shape)}"
            )

    def of_expert(self, expert: int) -> LeastSquares:
        """Return the map of one expert's rows; the same for all without an axis of experts."""
        if self.shares.ndim < 3:
            return self
        return LeastSquares(self.shares[:, expert], self.factors, self.back)

    def solve(self, tasks: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """Return x, rows × in, for τ_i (rows × in each, in this map's dtype and device).

        Overwrites ``tasks``; x goes into ``out``, no task, where it is given. Linear, and exactly
        zero where all tasks are. Two products of rows × in × K; holds x and rows × K.
        """
        x = torch.empty_like(tasks[0]) if out is None else out
        for few in few_rows(x):
            mean = torch.mul(tasks[0][few], self.shares[0], out=x[few])
            for task, share in zip(tasks[1:], self.shares[1:], strict=True):
                mean.addcmul_(task[few], share)
            for task in tasks if self.back is not None else ():
                task[few].sub_(mean)
        if self.back is None:
            return x
        coordinates = x.new_empty(x.shape[0], self.back.shape[0])
        start = 0
        for index, factor in enumerate(self.factors):
            if factor is None:
                continue
            part = coordinates[:, start : start + factor.shape[1]]
            start += factor.shape[1]
            if index < len(tasks):
                torch.mm(tasks[index], factor, out=part)
            else:
                torch.mm(x, factor, out=part).neg_()
        return x.addmm_(coordinates, self.back)


def plain_average(weights: Sequence[float]) -> LeastSquares:
    """Return x = Σ w_i τ_i / Σ w_i, for weights whose inputs have no second moments.

    Zero where all weights are.
    """
    wide = torch.tensor(list(weights), dtype=torch.float64, device="cpu")
    return LeastSquares((wide / (wide.sum() or 1.0))[:, None], (None,) * len(wide), None)


def least_squares(
    moments: Sequence[SecondMoment],
    weights: Sequence[float],
    *,
    anchor: SecondMoment | None = None,
    retain: float = 0.0,
    ridge: float = 0.0,
) -> LeastSquares:
    """Return the map from τ_i to x = Σ w_i τ_i C̃_i A⁻¹, A = Σ w_i C̃_i + κ C̃_0 + ε I.

    A channel that is zero in all inputs keeps the base (x = 0 there): what no input reaches is
    not moved. Where A is singular otherwise (α = 1, few tokens, no ridge) x is the shortest of
    all solutions, in units in which each channel is excited alike. Where nothing was measured at
    all, the whole diagonal being zero as a starved expert's is, x is the plain weighted average;
    of several experts, for each by itself.

    The small system is solved in float64: K × K, or in × in where K ≥ in. Beside the result
    (K × in in B's dtype), holds that system and a few thousand rows of B in float64.

    Args:
        moments: C̃_i, one for each task vector, all on one device.
        weights: w_i ≥ 0; at 0 a model has no say.
        anchor: C̃_0, of the model that is changed, on what it should go on doing.
        retain: κ ≥ 0.
        ridge: ε ≥ 0 as a multiple of the mean of A's diagonal (an expert's own).

    Raises:
        ValueError: shapes that differ, a negative number, or one that is not finite.
    """
    for name, value in (("a weight", min(weights)), ("retain", retain), ("ridge", ridge)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    if len({one.diagonal.shape for one in (*moments, anchor or moments[0])}) > 1:
        shapes = [tuple(one.diagonal.shape) for one in (*moments, anchor or moments[0])]
        raise ValueError(f"second moments have shapes {shapes}")
    terms = list(zip(moments, weights, strict=True))
    if anchor is not None:
        terms.append((anchor, retain))
    diagonal = sum(weight * one.diagonal for one, weight in terms)
    loose = sum(weight * one.remainder for one, weight in terms)
    assert isinstance(diagonal, Tensor)
    assert isinstance(loose, Tensor)
    loose = torch.maximum(
        loose + ridge * diagonal.mean(-1, keepdim=True), SMALLEST_PIVOT * diagonal
    )
    # A channel without any energy: its numerators are zero too, so that any D will do.
    loose = torch.where(loose > 0, loose, 1.0)
    shares = torch.stack([weight * one.remainder / loose for one, weight in terms[: len(moments)]])
    unmeasured = (diagonal == 0).all(-1, keepdim=True)
    average = plain_average(weights).shares.to(loose.device)
    average = average.reshape(-1, *[1] * loose.ndim)
    shares = torch.where(unmeasured, average, shares)
    factors = tuple(None if weight == 0 else one.factor for one, weight in terms)
    columns = _Columns(
        tuple(
            (factor, weight)
            for factor, (_, weight) in zip(factors, terms, strict=True)
            if factor is not None
        )
    )
    return LeastSquares(shares, factors, _back(columns, loose) if columns.parts else None)


@dataclass(frozen=True)
class _Columns:
    """[√w_i B_i, …], in × K, never whole: one part for every model that has a B."""

    parts: tuple[tuple[Tensor, float], ...]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Return its rows in float64, some at a time."""
        for start in range(0, self.parts[0][0].shape[0], _CHANNELS):
            rows = slice(start, start + _CHANNELS)
            yield rows, torch.cat([b[rows].double() * math.sqrt(w) for b, w in self.parts], 1)

    def roots(self) -> Tensor:
        """Return √w_i, once for each column, as a column."""
        return torch.cat(
            [b.new_full((b.shape[1], 1), math.sqrt(w), dtype=torch.float64) for b, w in self.parts]
        )


def _back(columns: _Columns, loose: Tensor) -> Tensor:
    """Return the rows (w_i A⁻¹ B_i)ᵀ, K × in, for A = diag(D) + S Sᵀ, S = [√w_i B_i, …].

    A⁻¹ S = D⁻¹ S (I + Sᵀ D⁻¹ S)⁻¹.
    """
    roots = columns.roots()
    width, count = len(loose), len(roots)
    back = loose.new_empty(count, width, dtype=columns.parts[0][0].dtype)
    if count >= width:
        whole = torch.cat([block for _, block in columns.blocks()])
        system = torch.addmm(torch.diag(loose), whole, whole.T)
        return back.copy_(torch.cholesky_solve(whole, torch.linalg.cholesky(system)).T * roots)
    system = torch.eye(count, dtype=torch.float64, device=loose.device)
    for rows, block in columns.blocks():
        block *= loose[rows].rsqrt()[:, None]
        system.addmm_(block.T, block)
    lower = torch.linalg.cholesky(system)
    for rows, block in columns.blocks():
        block /= loose[rows][:, None]
        back[:, rows] = torch.cholesky_solve(block.T, lower) * roots
    return back


def _checked(values: Tensor, name: str) -> Tensor:
    values = values.double()
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError(f"the {name} of a second moment must be finite and not negative")
    return values


def _row_energies(factor: Tensor) -> Tensor:
    """Return ‖row‖² in float64, a few thousand rows at a time."""
    blocks = torch.split(factor, _CHANNELS)
    return torch.cat([block.double().square().sum(1) for block in blocks])
