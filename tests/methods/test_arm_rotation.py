"""The rotation of single rows: lengths, ends, small parts, scales."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from mergekit_arm.methods.step import Incoming, arm_step
from tests.support.arm_reference import (
    REPEATABLE,
    kernel,
    orthonormal,
    problems,
    reference,
    task_of,
    tensor,
)

pytestmark = pytest.mark.filterwarnings("error")


@given(problems())
@settings(REPEATABLE, max_examples=100)
def test_row_norms_are_kept(problem: dict[str, Any]) -> None:
    problem["weight"] = np.zeros_like(problem["weight"])
    problem["rate"] = 1.0
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 3e-6)):
        rows = kernel(problem, dtype).double()
        given_rows = tensor(problem["checkpoint"], dtype).double()
        torch.testing.assert_close(rows.norm(dim=1), given_rows.norm(dim=1), rtol=rtol, atol=1e-37)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-5)])
@pytest.mark.parametrize("share", [0.7, 0.05, 1e-3, 1e-5])
def test_full_rotation_ends_inside_or_orthogonal(
    dtype: torch.dtype, tolerance: float, share: float
) -> None:
    """Also where the part that is enlarged to full length was a hundred-thousandth."""
    rng = np.random.default_rng(6)
    basis = orthonormal(rng, 48, 12)
    inside = rng.standard_normal((10, 12)) @ basis.T
    outside = rng.standard_normal((10, 48))
    outside -= outside @ basis @ basis.T
    inside /= np.linalg.norm(inside, axis=1, keepdims=True)
    outside /= np.linalg.norm(outside, axis=1, keepdims=True)
    within = task_of(outside + share * inside, basis, 1.0, dtype=dtype).double()
    away = task_of(inside + share * outside, basis, -1.0, dtype=dtype).double()
    span = tensor(np.linalg.qr(tensor(basis, dtype).double().numpy())[0])
    assert (within - within @ span @ span.T).norm(dim=1).max() < tolerance
    assert (away @ span).norm(dim=1).max() < tolerance
    # … in the direction of that very part.
    resolved = 1e-12 if dtype == torch.float64 else 1e-7 / share + 3e-5
    for result, part in ((within, inside), (away, outside)):
        aligned = torch.nn.functional.cosine_similarity(result, tensor(part))
        assert (1 - aligned).max() < max(10 * resolved**2, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rotation", [1.0, -1.0, 0.3, -0.3])
@pytest.mark.parametrize("mostly", ["inside", "outside"])
def test_rows_with_almost_no_second_part_keep_their_direction(
    dtype: torch.dtype, rotation: float, mostly: str
) -> None:
    rng = np.random.default_rng(7)
    basis = orthonormal(rng, 32, 8)
    inside = basis @ rng.standard_normal(8)
    outside = rng.standard_normal(32)
    outside -= basis @ (basis.T @ outside)
    first, second = (inside, outside) if mostly == "inside" else (outside, inside)
    first, second = first / np.linalg.norm(first), second / np.linalg.norm(second)
    rows = np.stack([first, first + 5e-7 * second, first + 3e-6 * second])
    result = task_of(rows, basis, rotation, dtype=dtype).double().numpy()
    np.testing.assert_allclose(result[:2], rows[:2], atol=3e-7)
    away = (rotation > 0) == (mostly == "inside")
    if away:  # the small part shrinks further
        np.testing.assert_allclose(result[2], rows[2], atol=4e-6)
    else:
        turned = abs(rotation) * math.pi / 2
        assert result[2] @ first == pytest.approx(math.cos(turned), abs=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-13, 1.0, 1e15, 1e25])
def test_the_scale_of_a_row_does_not_matter(scale: float) -> None:
    rng = np.random.default_rng(8)
    basis = orthonormal(rng, 32, 8)
    rows = rng.standard_normal((5, 32))
    plain = task_of(rows, basis, -0.4, dtype=torch.float32)
    scaled = task_of(rows * scale, basis, -0.4, dtype=torch.float32)
    torch.testing.assert_close(scaled.double() / scale, plain.double(), rtol=1e-4, atol=1e-6)


def test_non_finite_rows_stay_visible_and_alone() -> None:
    rng = np.random.default_rng(9)
    basis = orthonormal(rng, 32, 8)
    rows = rng.standard_normal((4, 32))
    clean = task_of(rows, basis, -0.4, dtype=torch.float32)
    rows[1, 3], rows[2, 0] = np.nan, np.inf
    result = task_of(rows, basis, -0.4, dtype=torch.float32)
    assert not torch.isfinite(result[1:3]).any()
    assert torch.equal(result[[0, 3]], clean[[0, 3]])


def test_rows_that_float32_does_not_resolve_are_mixed_in_correctly() -> None:
    """Rows that did not move, and rows almost inside or outside, in every block."""
    rng = np.random.default_rng(21)
    basis = tensor(orthonormal(rng, 96, 11), torch.float32)
    span = np.linalg.qr(basis.double().numpy())[0]
    tau = rng.standard_normal((2000, 96))
    inside = tau @ span @ span.T
    tau[::3] = 1e-4 * tau[::3] + inside[::3]
    tau[1::5] = tau[1::5] - inside[1::5] * (1 - 1e-3)
    tau[2::7] = 0
    tau = tau.astype(np.float32).astype(np.float64)
    expected = reference(np.zeros_like(tau), tau, 1.0, span, -0.7)
    result = task_of(tau, basis.numpy(), -0.7, dtype=torch.float32)
    np.testing.assert_allclose(result, expected, atol=2e-5)


@pytest.mark.parametrize("rotation", [-0.7, 0.7])
def test_rows_that_one_checkpoint_of_two_resolves_add_up(rotation: float) -> None:
    rng = np.random.default_rng(22)
    basis = tensor(orthonormal(rng, 96, 11), torch.float32)
    span = np.linalg.qr(basis.double().numpy())[0]
    tasks = rng.standard_normal((2, 60, 96))
    inside = tasks @ span @ span.T
    tasks[0, ::3] = 1e-4 * tasks[0, ::3] + inside[0, ::3]
    tasks[1, ::2] -= (1 - 1e-4) * inside[1, ::2]
    tasks[1, 1::4] = 0
    tasks = tasks.astype(np.float32).astype(np.float64)
    incoming = [
        Incoming(tensor(tasks[0], torch.float32), 0.5),
        Incoming(tensor(tasks[1], torch.float32), 1.5),
    ]
    result = arm_step(torch.zeros(60, 96), incoming, basis, rotation=rotation)
    expected = reference(np.zeros((60, 96)), tasks[0], 0.5, span, rotation)
    expected += reference(np.zeros((60, 96)), tasks[1], 1.5, span, rotation)
    np.testing.assert_allclose(result, expected, atol=1e-4)
