"""The mathematics of a second moment: its sketch, its leading eigenvectors, the energy they hold.

For inputs X (n × in) the second moment C = XᵀX / n would take in × in numbers. Kept instead are::

    Y = Σ Xᵀ (X Ω)    in × r, Ω a fixed random in × r
    Σ ‖x‖²            = n · tr C, exact
    n

all of which add. C ≈ Y (ΩᵀY)⁻¹ Yᵀ / n (Nyström) then gives the leading eigenvectors. Its
eigenvalues never exceed the true ones, so that their sum over the exact trace is a lower bound
of the energy that the eigenvectors hold. Where 2 r ≥ in, Ω is the identity: Y is the second
moment itself, for at most twice the memory and half the arithmetic: symmetric, it needs no blocks
below the diagonal (about in² against 4·in·r operations a token).

A sketch of r columns finds r/4 directions well, and no more are stored, so that the size of a
directory is bounded before anything is measured.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_arm.errors import InputError
from mergekit_arm.statistics.kinds.eigen import leading_eigenpairs

_PANEL = 256
"""Rows of a second moment that are added to at once: a small part of it, a large product."""
_ROUNDING = 1e-6
"""Energies this close are equal: eigenvalues are stored in float32."""


def default_rank(width: int) -> int:
    """Return the sketch columns for an input of ``width`` channels where none are asked for.

    At 768, statistics of SmolLM2 stay under 15 % of its checkpoint, and the directions of every
    input hold at least 0.99 of what as many exact ones would
    (``tests/real/test_smollm2_arm.py``).
    """
    return min(width, 768)


def chosen_rank(width: int, asked: int | None) -> int:
    """Return r for an input of ``width`` channels: what was asked for, or the default."""
    return min(width, asked or default_rank(width))


def stored_directions(width: int, rank: int) -> int:
    """Return how many directions are stored at most of ``width`` channels and r = ``rank``."""
    # None of a whole second moment's directions is poorly resolved, and few take no room.
    few = min(rank, 64) if is_whole(width, rank) else 1
    return max(few, rank // 4)


@functools.lru_cache(maxsize=16)
def sketch_matrix(width: int, rank: int, seed: int, device: torch.device) -> Tensor | None:
    """Return Ω (width × rank, float32), the same on every device, or None for the identity.

    One matrix serves every site of a width. Entries are normal with variance 1/width, so that
    its columns have length about 1.
    """
    if is_whole(width, rank):
        return None
    # Drawn on the CPU: other devices' generators give other numbers.
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(width, rank, generator=generator) / math.sqrt(width)
    return normal.to(device)


@dataclass(frozen=True)
class Dominant:
    """The leading eigenvectors of a second moment C."""

    basis: Tensor
    """in × k, float64, orthonormal columns, by falling eigenvalue."""
    eigenvalues: Tensor
    """(k,), float64: lower bounds of C's leading eigenvalues."""
    trace: float
    """tr C, exact: the mean squared norm of an input."""
    tokens: int
    """Inputs seen."""
    reached: bool
    """False where ``most`` directions hold less than the energy asked for."""

    @property
    def energy(self) -> float:
        """The share of tr C that the basis holds at least."""
        return float(self.eigenvalues.sum()) / self.trace if self.trace else 1.0


def dominant_subspace(
    sketch: Tensor,
    omega: Tensor | None,
    square_norm: float,
    tokens: int,
    *,
    energy: float,
    most: int,
) -> Dominant:
    """Return the fewest leading eigenvectors of C = XᵀX / n that hold ``energy`` of tr C.

    ``most`` of them, or all that the inputs span, where those do not hold as much. None where
    nothing, or nothing but zeros, was seen.

    Args:
        sketch: Y = Σ Xᵀ(XΩ), in × r.
        omega: Ω, or None for the identity, where Y's upper triangle is enough.
        square_norm: Σ ‖x‖².
        tokens: n.
        energy: p in (0, 1].
        most: directions at most, at least 1.
    """
    values, vectors = leading_eigenpairs(sketch, omega, most, energy * square_norm)
    values, trace = values / max(tokens, 1), square_norm / max(tokens, 1)
    count, reached = _count(values, trace, energy)
    return Dominant(vectors[:, :count], values[:count], trace, tokens, reached)


def columns_for_energy(
    eigenvalues: Tensor, trace: float, energy: float, *, measured: float, where: str
) -> int:
    """Return how many stored columns hold ``energy`` of the trace.

    All of them, where the measurement was asked for as much (``measured``) and its rank did not
    reach it: ``calibrate`` has said so.

    Args:
        eigenvalues: (k,), falling, as stored.
        trace: tr C, as stored.
        energy: p in (0, 1] that the merge asks for.
        measured: p that the measurement was asked for.
        where: the statistics and site, for the message.

    Raises:
        InputError: more energy than the statistics hold, or numbers that are not finite.
    """
    if not (math.isfinite(trace) and bool(eigenvalues.isfinite().all())):
        raise InputError(f"{where}: the subspace's energies are not finite; measure it again")
    count, reached = _count(eigenvalues.double(), trace, energy)
    if not reached and energy > measured * (1 + _ROUNDING):
        held = float(eigenvalues.double().sum()) / trace
        raise InputError(
            f"{where}: energy {energy:g} asked for, {held:.4f} stored; set energy to at most "
            f"{measured:g}, or calibrate again with --energy {energy:g}"
        )
    return count


def orthonormal(basis: Tensor, where: str = "activation_stats") -> Tensor:
    """Return float32 columns, orthonormal to 1e-7, with the spans of a rounded basis.

    The first j columns span what the first j given ones do, for every j (Gram–Schmidt order,
    by Cholesky in float64: UᵀU is the identity but for the rounding).

    Raises:
        InputError: ``where``: the columns are not nearly orthonormal, as a damaged file's.
    """
    wide, narrow = basis.double(), basis.float()
    gram = wide.T @ wide
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    if not bool(((gram - eye).abs() < 0.01).all()):
        raise InputError(f"{where}: the stored basis is damaged; copy or measure it again")
    inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), eye, upper=False).T
    # U + U (L⁻ᵀ − I): the correction is small enough for a float32 product.
    return torch.addmm(narrow, narrow, (inverse - eye).float())


def missed(held: float, asked: float) -> bool:
    """Say whether ``held``, rounded to six digits, is less energy than was asked for."""
    return held < asked * (1 - _ROUNDING) - 5e-7


def add_second_moment(total: Tensor, x: Tensor) -> None:
    """Add XᵀX to ``total`` (in × in), but for the blocks below its diagonal."""
    for start in range(0, total.shape[0], _PANEL):
        rows = slice(start, start + _PANEL)
        total[rows, start:].addmm_(x[:, rows].T, x[:, start:])


def is_whole(width: int, rank: int) -> bool:
    """Say whether the second moment itself is kept."""
    return 2 * rank >= width


def _count(eigenvalues: Tensor, trace: float, energy: float) -> tuple[int, bool]:
    """Return the fewest leading values whose sum is ``energy`` of the trace, or all, and False."""
    if trace == 0:
        return 0, True
    enough = eigenvalues.cumsum(0) >= energy * trace * (1 - _ROUNDING)
    reached = bool(enough.any())
    return (int(enough.int().argmax()) + 1 if reached else len(eigenvalues)), reached
