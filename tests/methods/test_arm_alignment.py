"""The direct rotation that carries one subspace to another."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mergekit_arm.methods.alignment import align, principal_planes
from mergekit_arm.methods.step import Incoming, arm_step
from tests.support.arm_reference import (
    orthonormal,
    plane_rotation,
    reference,
    tensor,
)

pytestmark = pytest.mark.filterwarnings("error")


def test_alignment_keeps_its_digits_in_rows_that_it_carries_into_the_subspace() -> None:
    rng = np.random.default_rng(20)
    basis = tensor(orthonormal(rng, 40, 8), torch.float32)
    other = tensor(
        np.linalg.qr(basis.numpy() + 0.3 * rng.standard_normal((40, 8)))[0], torch.float32
    )
    rows = (rng.standard_normal((6, 8)) @ other.numpy().T).astype(np.float32)
    rows += (1e-4 * rng.standard_normal((6, 40))).astype(np.float32)
    result = arm_step(
        torch.zeros(6, 40),
        [Incoming(tensor(rows, torch.float32), 1.0, other)],
        basis,
        rotation=-1.0,
        alignment=1.0,
    )
    spans = [np.linalg.qr(one.double().numpy())[0] for one in (basis, other)]
    expected = reference(
        np.zeros((6, 40)), rows.astype(np.float64), 1.0, spans[0], -1.0, spans[1], 1.0
    )
    # The bases are orthonormal to 1e-7; that, over the 1e-4 that is enlarged to full length.
    np.testing.assert_allclose(result, expected, atol=1e-3)


def alignment_matrix(start: np.ndarray, end: np.ndarray, alignment: float) -> np.ndarray:
    """The kernel's R_γ, column convention."""
    planes = principal_planes(tensor(end), tensor(start), alignment)
    return align(torch.eye(start.shape[0], dtype=torch.float64), planes).numpy().T


def test_alignment_squares_to_the_product_of_the_two_reflections() -> None:
    rng = np.random.default_rng(15)
    start, end = orthonormal(rng, 20, 6), orthonormal(rng, 20, 6)
    full = alignment_matrix(start, end, 1.0)
    reflections = (2 * end @ end.T - np.eye(20)) @ (2 * start @ start.T - np.eye(20))
    np.testing.assert_allclose(full @ full, reflections, atol=1e-10)
    half = alignment_matrix(start, end, 0.5)
    np.testing.assert_allclose(half @ half, full, atol=1e-10)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-8, 1e-6, 1e-3, 1.0, math.pi / 2 - 1e-9])
@pytest.mark.parametrize("alignment", [0.3, 1.0])
def test_alignment_turns_a_single_plane_by_a_known_angle(angle: float, alignment: float) -> None:
    start = np.zeros((5, 2))
    start[0, 0] = start[1, 1] = 1
    end = start.copy()
    end[:, 0] = [math.cos(angle), 0, math.sin(angle), 0, 0]
    expected = plane_rotation(np.eye(5)[0], np.eye(5)[2], alignment * angle)
    np.testing.assert_allclose(alignment_matrix(start, end, alignment), expected, atol=1e-8)


@pytest.mark.parametrize(("k_c", "k"), [(3, 7), (7, 3), (5, 5), (12, 5), (0, 5), (5, 12)])
def test_full_alignment_carries_one_span_into_the_other(k_c: int, k: int) -> None:
    rng = np.random.default_rng(16)
    start, end = orthonormal(rng, 12, k_c), orthonormal(rng, 12, k)
    matrix = alignment_matrix(start, end, 1.0)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(12), atol=1e-12)
    carried = matrix @ start
    if k_c <= k:
        assert np.abs(carried - end @ (end.T @ carried)).max(initial=0) < 1e-12
    else:
        assert np.abs(end - carried @ (carried.T @ end)).max(initial=0) < 1e-12
    outside = np.linalg.qr(np.hstack([start, end]))[0]
    free = np.eye(12) - outside @ outside.T
    np.testing.assert_allclose(matrix @ free, free, atol=1e-12)


def test_orthogonal_subspaces_are_carried_too() -> None:
    matrix = alignment_matrix(np.eye(9)[:, :4], np.eye(9)[:, 4:8], 1.0)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(9), atol=1e-12)
    carried = matrix @ np.eye(9)[:, :4]
    assert np.abs(carried[[0, 1, 2, 3, 8]]).max() < 1e-12


def test_alignment_of_equal_subspaces_and_of_none_is_nothing() -> None:
    rng = np.random.default_rng(17)
    basis = orthonormal(rng, 12, 5)
    same = basis @ orthonormal(rng, 5, 5)
    np.testing.assert_allclose(alignment_matrix(same, basis, 1.0), np.eye(12), atol=1e-12)
    np.testing.assert_allclose(alignment_matrix(basis[:, :0], basis, 1.0), np.eye(12), atol=0)
