"""ARM in explicit loops and explicit in × in matrices, float64, and problems to compare on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from mergekit_arm.methods.step import Incoming, arm_step

REPEATABLE = settings(deadline=None, derandomize=True)


def reference(
    weight: np.ndarray,
    checkpoint: np.ndarray,
    rate: float,
    basis: np.ndarray,
    rotation: float,
    checkpoint_basis: np.ndarray | None = None,
    alignment: float = 0.0,
) -> np.ndarray:
    """One step, in × in matrices and all: Rodrigues' formula for every plane."""
    result = weight.copy()
    turn = np.eye(weight.shape[1])
    if checkpoint_basis is not None:
        turn = explicit_alignment(checkpoint_basis, basis, alignment)
    projector = basis @ basis.T
    for i in range(weight.shape[0]):
        row = turn @ (checkpoint[i] - weight[i])
        result[i] += rate * turned_row(row, projector, rotation)
    return result


def turned_row(row: np.ndarray, projector: np.ndarray, rotation: float) -> np.ndarray:
    inside = projector @ row
    outside = row - inside
    norm = math.sqrt(sum(x * x for x in row))
    a, b = np.linalg.norm(inside), np.linalg.norm(outside)
    if norm == 0 or a < 1e-6 * norm or b < 1e-6 * norm or rotation == 0:
        return row
    theta = math.acos(min(a / norm, 1.0)) if a < b else math.asin(min(b / norm, 1.0))
    by = -rotation * theta if rotation > 0 else -rotation * (math.pi / 2 - theta)
    return plane_rotation(inside / a, outside / b, by) @ row


def plane_rotation(start: np.ndarray, end: np.ndarray, angle: float) -> np.ndarray:
    """The matrix that turns ``start`` towards the orthogonal ``end`` by ``angle``."""
    both = np.outer(start, start) + np.outer(end, end)
    across = np.outer(end, start) - np.outer(start, end)
    return np.eye(len(start)) + (math.cos(angle) - 1) * both + math.sin(angle) * across


def explicit_alignment(
    checkpoint_basis: np.ndarray, basis: np.ndarray, alignment: float
) -> np.ndarray:
    left, cosines, right = np.linalg.svd(checkpoint_basis.T @ basis, full_matrices=False)
    matrix = np.eye(basis.shape[0])
    for j, cosine in enumerate(cosines):
        p, q = checkpoint_basis @ left[:, j], basis @ right[j]
        rest = q - (p @ q) * p
        if np.linalg.norm(rest) < 1e-12:
            continue
        angle = math.atan2(np.linalg.norm(rest), cosine)
        matrix = plane_rotation(p, rest / np.linalg.norm(rest), alignment * angle) @ matrix
    return matrix


def orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def tensor(array: np.ndarray, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


def task_of(rows: np.ndarray, basis: np.ndarray, rotation: float, **options: Any) -> Tensor:
    """τ' of task vectors: a step from zero at η = 1."""
    tau = tensor(rows, options.pop("dtype", torch.float64))
    incoming = [Incoming(tau, 1.0)]
    return arm_step(
        torch.zeros_like(tau), incoming, tensor(basis, tau.dtype), rotation=rotation, **options
    )


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, width = draw(st.integers(1, 9)), draw(st.integers(2, 24))
    k, k_c = draw(st.integers(1, width - 1)), draw(st.integers(0, width))
    scale = 10.0 ** draw(st.floats(-25, 3))
    weight = rng.standard_normal((rows, width)) * draw(st.sampled_from([0.0, 1.0]))
    tau = rng.standard_normal((rows, width)) * scale
    basis = orthonormal(rng, width, k)
    # Close subspaces as well as unrelated ones, and parts of each other.
    mix = draw(st.sampled_from([0.0, 1e-9, 1e-3, 1.0]))
    other = orthonormal(rng, width, width)
    other[:, :k] = basis + mix * rng.standard_normal(basis.shape)
    return {
        "weight": weight,
        "checkpoint": weight + tau,
        "rate": draw(st.floats(0.01, 2)),
        "basis": basis,
        "rotation": draw(st.floats(-1, 1) | st.sampled_from([-1.0, 0.0, 1.0])),
        "checkpoint_basis": np.linalg.qr(other)[0][:, :k_c],
        "alignment": draw(st.floats(0, 1) | st.sampled_from([0.0, 1.0])),
    }


def kernel(problem: dict[str, Any], dtype: torch.dtype = torch.float64) -> Tensor:
    return arm_step(
        tensor(problem["weight"], dtype),
        [
            Incoming(
                tensor(problem["checkpoint"], dtype),
                problem["rate"],
                tensor(problem["checkpoint_basis"], dtype),
            )
        ],
        tensor(problem["basis"], dtype),
        rotation=problem["rotation"],
        alignment=problem["alignment"],
    )
