"""Second moments and least squares under them, dense, in float64, from data and square roots.

Written the other way round from the package: a moment here is a matrix whose square root stands
for data, and a solution is ``lstsq`` of stacked data, never of normal equations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from mergekit_arm.methods.moments import LeastSquares, SecondMoment, least_squares, second_moment
from tests.support.arm_reference import orthonormal, tensor


@dataclass
class Stored:
    """What a statistics directory says of one site."""

    diagonal: np.ndarray
    basis: np.ndarray
    eigenvalues: np.ndarray

    def package(self, alpha: float) -> SecondMoment:
        basis, eigenvalues = tensor(self.basis), tensor(self.eigenvalues)
        return second_moment(tensor(self.diagonal), basis, eigenvalues, alpha=alpha)

    def dense(self, alpha: float) -> np.ndarray:
        """C̃, entry by entry."""
        width, count = self.basis.shape
        low_rank = np.zeros((width, width))
        for a in range(count):
            low_rank += self.eigenvalues[a] * np.outer(self.basis[:, a], self.basis[:, a])
        matrix = np.zeros((width, width))
        for i in range(width):
            matrix[i, i] = self.diagonal[i]
            for j in range(width):
                if i != j:
                    shrink = 1.0
                    for c in (i, j):
                        if low_rank[c, c] > self.diagonal[c]:
                            shrink *= math.sqrt(self.diagonal[c] / low_rank[c, c])
                    matrix[i, j] = alpha * shrink * low_rank[i, j]
        return matrix


def of_data(data: np.ndarray, rank: int, sample: int | None = None) -> Stored:
    """What is stored of ``data`` (tokens × in): the diagonal of all, eigenpairs of a sample."""
    few = data[:sample]
    values, vectors = np.linalg.eigh(few.T @ few / len(few))
    order = np.argsort(values)[::-1][:rank]
    return Stored((data**2).mean(0), vectors[:, order], np.maximum(values[order], 0))


@dataclass
class Problem:
    """Models to merge: what is stored of each, its weight, its task vector."""

    sites: list[Stored]
    weights: list[float]
    tasks: list[np.ndarray]
    alpha: float
    anchor: Stored | None = None
    retain: float = 0.0
    ridge: float = 0.0

    def package(self) -> LeastSquares:
        return least_squares(
            [site.package(self.alpha) for site in self.sites],
            self.weights,
            anchor=None if self.anchor is None else self.anchor.package(self.alpha),
            retain=self.retain,
            ridge=self.ridge,
        )

    def solve(self, dtype: torch.dtype = torch.float64) -> np.ndarray:
        """The package's x."""
        solution = self.package().to(torch.device("cpu"), dtype)
        return solution.solve([tensor(task, dtype).clone() for task in self.tasks]).double().numpy()

    def reference(self) -> np.ndarray:
        """x, as the least squares of data that have these second moments."""
        return solved(
            [site.dense(self.alpha) for site in self.sites],
            self.weights,
            self.tasks,
            None if self.anchor is None else self.anchor.dense(self.alpha),
            self.retain,
            self.ridge,
        )

    def scale(self) -> np.ndarray:
        """√ of A's diagonal: how much a change of each channel counts."""
        whole = sum(w * site.diagonal for w, site in zip(self.weights, self.sites, strict=True))
        if self.anchor is not None:
            whole = whole + self.retain * self.anchor.diagonal
        return np.sqrt(np.asarray(whole))

    def error(self, found: np.ndarray, wanted: np.ndarray) -> float:
        """The largest difference in what comes out, against the largest that could."""
        weigh = self.scale()
        most = max(float(np.abs(task * weigh).max()) for task in self.tasks)
        return float(np.abs((found - wanted) * weigh).max()) / (most or 1.0)


def solved(
    moments: list[np.ndarray],
    weights: list[float],
    tasks: list[np.ndarray],
    anchor: np.ndarray | None = None,
    retain: float = 0.0,
    ridge: float = 0.0,
) -> np.ndarray:
    """argmin Σ w ‖(x − τ) C^½‖² + κ ‖x C_0^½‖² + ε ‖x‖², shortest where it is not unique."""
    total = sum(w * one for w, one in zip(weights, moments, strict=True))
    if anchor is not None:
        total = total + retain * anchor
    diagonal = np.diag(np.asarray(total))
    live = diagonal > 0
    answer = np.zeros_like(tasks[0])
    # In units in which every channel is excited alike: float64 holds the rest.
    units = np.sqrt(diagonal[live])
    data, goals = [], []
    terms = list(zip(moments, weights, tasks, strict=True))
    if anchor is not None:
        terms.append((anchor, retain, answer))
    for moment, weight, task in terms:
        cut = moment[np.ix_(live, live)] / np.outer(units, units)
        values, vectors = np.linalg.eigh(weight * cut)
        root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
        data.append(root)
        goals.append(root @ (task[:, live] * units).T)
    if ridge and live.any():
        data.append(np.diag(math.sqrt(ridge * diagonal.mean()) / units))
        goals.append(np.zeros((len(units), len(answer))))
    if live.any():
        found = np.linalg.lstsq(np.concatenate(data), np.concatenate(goals), rcond=1e-9)[0]
        answer[:, live] = found.T / units
    return answer


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Low rank plus diagonal, full rank, diagonals, dead and massive channels, odd scales."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, width = draw(st.integers(1, 6)), draw(st.integers(2, 20))
    models = draw(st.integers(1, 3))
    scale = 10.0 ** draw(st.floats(-12, 8))
    massive = draw(st.sampled_from([1.0, 1.0, 1e4]))
    dead = draw(st.integers(0, 2))

    def site() -> Stored:
        data = rng.standard_normal((60, width)) @ rng.standard_normal((width, width))
        data[:, rng.integers(width)] *= massive
        data[:, rng.permutation(width)[:dead]] = 0
        rank = draw(st.integers(0, width))
        return of_data(scale * data, rank, draw(st.sampled_from([None, 7])))

    sites = [site() for _ in range(models)]
    weights = [draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])) for _ in range(models)]
    if not any(weights):
        weights[0] = 1.0
    alpha = draw(st.sampled_from([0.0, 0.5, 0.9, 0.99]))
    problem = Problem(sites, weights, [rng.standard_normal((rows, width)) for _ in sites], alpha)
    problem.ridge = draw(st.sampled_from([0.0, 1e-6, 1e-2]))
    if draw(st.booleans()):
        problem.anchor, problem.retain = site(), draw(st.sampled_from([0.0, 0.3, 3.0]))
    return problem


def turned(
    task: np.ndarray, moment: np.ndarray, general: np.ndarray, retain: float, turn: float
) -> np.ndarray:
    """τ' of every row, by rotation matrices' action in the plane of τ and d."""
    goals = solved([moment], [1.0], [task], general, retain)
    result = task.copy()
    for row, (one, goal) in enumerate(zip(task, goals, strict=True)):
        length, reach = np.linalg.norm(one), np.linalg.norm(goal)
        if length == 0 or reach == 0:
            continue
        ahead = one / length
        aside = goal - (goal @ ahead) * ahead
        if np.linalg.norm(aside) < 1e-12 * reach:
            continue
        angle = turn * math.atan2(np.linalg.norm(aside), goal @ ahead)
        aside /= np.linalg.norm(aside)
        result[row] = length * (math.cos(angle) * ahead + math.sin(angle) * aside)
    return result


def full_rank(rng: np.random.Generator, width: int, tokens: int = 80) -> Stored:
    """A whole second moment, well conditioned."""
    return of_data(rng.standard_normal((tokens, width)) @ orthonormal(rng, width, width), width)


def wide_moment(seed: int, width: int = 1536, rank: int = 64) -> SecondMoment:
    """A moment of a real layer's size, in the precision of stored ones."""
    basis = tensor(orthonormal(np.random.default_rng(seed), width, rank), torch.float32)
    eigenvalues = torch.linspace(9, 1, rank)
    return second_moment(1 + basis.square() @ eigenvalues, basis, eigenvalues, alpha=0.9)
