"""The ARM kernel against a float64 reference of explicit loops and explicit in × in matrices."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mergekit_arm.methods.rotation import Incoming, align, arm_step, principal_planes

pytestmark = pytest.mark.filterwarnings("error")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
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


@given(problems())
@settings(REPEATABLE, max_examples=300)
def test_float64_equals_the_reference(problem: dict[str, Any]) -> None:
    expected = reference(**problem)
    length = np.linalg.norm(problem["checkpoint"] - problem["weight"], axis=1, keepdims=True)
    allowed = 1e-7 * length + 1e-14 * np.abs(expected)
    assert (np.abs(kernel(problem).numpy() - expected) <= allowed).all()


@given(problems())
@settings(REPEATABLE, max_examples=200)
def test_float32_agrees_with_the_reference(problem: dict[str, Any]) -> None:
    # The reference gets what the kernel gets: rounded inputs, the exact span of rounded bases.
    for key in ("weight", "checkpoint", "basis", "checkpoint_basis"):
        problem[key] = problem[key].astype(np.float32).astype(np.float64)
    result = kernel(problem, torch.float32)
    for key in ("basis", "checkpoint_basis"):
        problem[key] = np.linalg.qr(problem[key])[0]
    cosines = np.linalg.svd(problem["checkpoint_basis"].T @ problem["basis"])[1]
    # The direct rotation is discontinuous where an angle is π/2: rounded bases may differ there.
    assume(problem["alignment"] == 0 or cosines.min(initial=1) > 1e-2)
    expected = reference(**problem)
    length = np.linalg.norm(problem["checkpoint"] - problem["weight"], axis=1, keepdims=True)
    allowed = 1e-4 * length + 1e-6 * np.abs(expected) + 1e-37
    assert (np.abs(result.numpy() - expected) <= allowed).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_half_precision_is_the_float32_result_rounded_once(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    weight = tensor(rng.standard_normal((40, 64)), dtype)
    checkpoint = tensor(rng.standard_normal((40, 64)), dtype)
    basis = tensor(orthonormal(rng, 64, 9), torch.float32)
    half = arm_step(weight, [Incoming(checkpoint, 0.5)], basis, rotation=-0.4)
    full = arm_step(weight.float(), [Incoming(checkpoint.float(), 0.5)], basis, rotation=-0.4)
    assert half.dtype == dtype
    assert torch.equal(half, full.to(dtype))


def test_a_float32_stream_takes_half_precision_checkpoints() -> None:
    rng = np.random.default_rng(1)
    weight = tensor(rng.standard_normal((20, 32)), torch.float32)
    checkpoint = tensor(rng.standard_normal((20, 32)), torch.bfloat16)
    basis = tensor(orthonormal(rng, 32, 5), torch.float32)
    result = arm_step(weight, [Incoming(checkpoint, 0.3)], basis, rotation=0.5)
    expected = arm_step(weight, [Incoming(checkpoint.float(), 0.3)], basis, rotation=0.5)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize(("rotation", "alignment"), [(0.0, 0.0), (-0.4, 0.0), (1.0, 0.7)])
def test_equal_checkpoint_or_zero_rate_gives_the_weight_bit_for_bit(
    dtype: torch.dtype, rotation: float, alignment: float
) -> None:
    rng = np.random.default_rng(2)
    weight = tensor(rng.standard_normal((6, 16)), dtype)
    weight[0, 0], weight[1, 1] = -0.0, 0.0
    basis = tensor(orthonormal(rng, 16, 4), torch.float32)
    other = tensor(orthonormal(rng, 16, 5), torch.float32)
    far = tensor(rng.standard_normal((6, 16)), dtype)
    for incoming in (
        [Incoming(weight.clone(), 0.7, other)],
        [Incoming(far, 0.0, other)],
        [Incoming(weight.clone(), 0.7, other), Incoming(far, 0.0, other)],
        [],
    ):
        result = arm_step(weight, incoming, basis, rotation=rotation, alignment=alignment)
        assert result.data_ptr() != weight.data_ptr()
        assert (
            result.numpy(force=True).tobytes() == weight.numpy(force=True).tobytes()
            if (dtype != torch.bfloat16)
            else torch.equal(result.view(torch.int16), weight.view(torch.int16))
        )


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_neutral_settings_at_full_rate_give_the_checkpoint(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(3)
    # Widely different exponents: W + (W_c − W) would round.
    weight = tensor(rng.standard_normal((6, 16)) * 1e3, dtype)
    checkpoint = tensor(rng.standard_normal((6, 16)) * 1e-4, dtype)
    basis = tensor(orthonormal(rng, 16, 4), torch.float32)
    result = arm_step(weight, [Incoming(checkpoint, 1.0)], basis, rotation=0.0)
    assert torch.equal(result, checkpoint)
    assert result.data_ptr() != checkpoint.data_ptr()


@pytest.mark.parametrize("columns", [None, 0, 16])
def test_without_a_proper_subspace_it_is_task_arithmetic(columns: int | None) -> None:
    rng = np.random.default_rng(4)
    weight, one, two = (tensor(rng.standard_normal((6, 16))) for _ in range(3))
    basis = None if columns is None else tensor(orthonormal(rng, 16, 16)[:, :columns])
    incoming = [Incoming(one, 0.5, basis), Incoming(two, 0.25, basis)]
    result = arm_step(weight, incoming, basis, rotation=-0.8, alignment=0.5)
    torch.testing.assert_close(result, weight + 0.5 * (one - weight) + 0.25 * (two - weight))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,)])
def test_vectors_and_scalars_are_task_arithmetic(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(shape, generator=generator)
    checkpoint = torch.randn(shape, generator=generator)
    basis = tensor(orthonormal(np.random.default_rng(5), 16, 4), torch.float32)
    result = arm_step(weight, [Incoming(checkpoint, 0.5)], basis, rotation=-0.4)
    torch.testing.assert_close(result, weight + 0.5 * (checkpoint - weight))


@given(problems())
@settings(REPEATABLE, max_examples=100)
def test_neutral_settings_are_task_arithmetic(problem: dict[str, Any]) -> None:
    problem |= {"rotation": 0.0, "alignment": 0.0}
    linear = problem["weight"] + problem["rate"] * (problem["checkpoint"] - problem["weight"])
    terms = np.abs(problem["weight"]) + problem["rate"] * np.abs(problem["checkpoint"])
    assert (np.abs(kernel(problem).numpy() - linear) <= 1e-14 * terms).all()


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


@given(problems())
@settings(REPEATABLE, max_examples=100)
def test_rotating_the_input_coordinates_rotates_the_result(problem: dict[str, Any]) -> None:
    width = problem["weight"].shape[1]
    turn = orthonormal(np.random.default_rng(0), width, width)
    plain = kernel(problem).numpy() @ turn.T
    length = np.linalg.norm(problem["checkpoint"] - problem["weight"], axis=1, keepdims=True)
    for key in ("weight", "checkpoint"):
        problem[key] = problem[key] @ turn.T
    for key in ("basis", "checkpoint_basis"):
        problem[key] = turn @ problem[key]
    tau = np.linalg.norm(problem["checkpoint"] - problem["weight"], axis=1, keepdims=True)
    assume(np.abs(tau - length).max() < 1e-9 * length.max())  # else τ drowns in W's rounding
    assert (np.abs(kernel(problem).numpy() - plain) <= 1e-6 * length + 1e-13).all()


@given(problems())
@settings(REPEATABLE, max_examples=50)
def test_the_basis_counts_only_by_its_span(problem: dict[str, Any]) -> None:
    k = problem["basis"].shape[1]
    plain = kernel(problem).numpy()
    problem["basis"] = problem["basis"] @ orthonormal(np.random.default_rng(1), k, k)
    length = np.linalg.norm(problem["checkpoint"] - problem["weight"], axis=1, keepdims=True)
    assert (np.abs(kernel(problem).numpy() - plain) <= 1e-6 * length + 1e-13).all()


def test_permuting_rows_permutes_the_result_across_blocks() -> None:
    rng = np.random.default_rng(10)
    weight = tensor(rng.standard_normal((3000, 96)), torch.float32)  # several blocks
    checkpoint = tensor(rng.standard_normal((3000, 96)), torch.float32)
    basis = tensor(orthonormal(rng, 96, 11), torch.float32)
    order = torch.from_numpy(rng.permutation(3000))
    result = arm_step(weight, [Incoming(checkpoint, 0.5)], basis, rotation=-0.4)
    permuted = arm_step(weight[order], [Incoming(checkpoint[order], 0.5)], basis, rotation=-0.4)
    torch.testing.assert_close(permuted, result[order], rtol=1e-6, atol=1e-6)
    again = arm_step(weight, [Incoming(checkpoint, 0.5)], basis, rotation=-0.4)
    assert torch.equal(again, result)


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


@pytest.mark.parametrize("shape", [(0, 16), (5, 0), (2, 0, 16), (0, 4, 16)])
def test_empty_weights(shape: tuple[int, ...]) -> None:
    basis = None if shape[-1] == 0 else torch.eye(16)[:, :3]
    weight = torch.zeros(shape)
    assert arm_step(weight, [Incoming(weight, 0.5)], basis, rotation=-0.4).shape == shape


def test_updates_of_several_checkpoints_add() -> None:
    rng = np.random.default_rng(11)
    weight, one, two = (rng.standard_normal((7, 20)) for _ in range(3))
    basis, first, second = (orthonormal(rng, 20, k) for k in (5, 5, 8))
    result = arm_step(
        tensor(weight),
        [Incoming(tensor(one), 0.5, tensor(first)), Incoming(tensor(two), 1.5, tensor(second))],
        tensor(basis),
        rotation=-0.4,
        alignment=0.6,
    )
    expected = reference(weight, one, 0.5, basis, -0.4, first, 0.6) - weight
    expected += reference(weight, two, 1.5, basis, -0.4, second, 0.6)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-12)


def test_neutral_updates_at_full_rate_add() -> None:
    weight, one, two = torch.ones(2, 3), torch.full((2, 3), 3.0), torch.full((2, 3), 5.0)
    result = arm_step(weight, [Incoming(one, 1.0), Incoming(two, 1.0)], None, rotation=0.0)
    assert torch.equal(result, torch.full((2, 3), 7.0))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_along_the_first_axis(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(12)
    weight, checkpoint = (tensor(rng.standard_normal((24, 10)), dtype) for _ in range(2))
    basis = tensor(orthonormal(rng, 24, 5), torch.float32)
    stored = arm_step(weight, [Incoming(checkpoint, 0.5)], basis, rotation=-0.4, input_axis=0)
    usual = arm_step(weight.T.clone(), [Incoming(checkpoint.T.clone(), 0.5)], basis, rotation=-0.4)
    assert stored.shape == weight.shape
    assert stored.is_contiguous()
    torch.testing.assert_close(stored, usual.T)


@pytest.mark.parametrize("input_axis", [-1, 1, 2])
def test_experts_are_rows(input_axis: int) -> None:
    rng = np.random.default_rng(13)
    weight, checkpoint = (tensor(rng.standard_normal((3, 12, 12))) for _ in range(2))
    basis = tensor(orthonormal(rng, 12, 5))
    fused = arm_step(
        weight, [Incoming(checkpoint, 0.5)], basis, rotation=0.4, input_axis=input_axis
    )
    for expert in range(3):
        single = arm_step(
            weight[expert],
            [Incoming(checkpoint[expert], 0.5)],
            basis,
            rotation=0.4,
            input_axis=0 if input_axis == 1 else 1,
        )
        assert torch.equal(fused[expert], single)


def test_views_are_taken_and_nothing_given_is_changed() -> None:
    rng = np.random.default_rng(14)
    weight = tensor(rng.standard_normal((30, 40)), torch.float32)[::2, ::2]
    checkpoint = tensor(rng.standard_normal((20, 15)), torch.float32).T
    basis, other = (tensor(orthonormal(rng, 20, k), torch.float32) for k in (6, 4))
    copies = [one.clone() for one in (weight, checkpoint, basis, other)]
    result = arm_step(
        weight, [Incoming(checkpoint, 0.5, other)], basis, rotation=-0.4, alignment=1.0
    )
    dense = arm_step(
        copies[0], [Incoming(copies[1], 0.5, other)], basis, rotation=-0.4, alignment=1.0
    )
    torch.testing.assert_close(result, dense)
    align(weight, principal_planes(basis, other, 0.5))
    for one, copy in zip((weight, checkpoint, basis, other), copies, strict=True):
        assert torch.equal(one, copy)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotation": 1.5}, "rotation must lie in"),
        ({"rotation": math.nan}, "rotation must lie in"),
        ({"alignment": -0.1}, "alignment must lie in"),
        ({"alignment": 0.5}, "needs the basis of every checkpoint"),
        ({"basis": torch.eye(7)[:, :2]}, "8 inputs, a basis shape"),
        ({"input_axis": 0}, "4 inputs, a basis shape"),
        ({"incoming": [Incoming(torch.ones(8, 4), 0.5)]}, "shapes"),
        (
            {"incoming": [Incoming(torch.ones(4, 8), 0.5, torch.eye(7))], "alignment": 0.5},
            "8 inputs, a basis shape",
        ),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "incoming": [Incoming(torch.ones(4, 8), 0.5)],
        "basis": torch.eye(8)[:, :2],
        "rotation": -0.4,
    } | changes
    with pytest.raises(ValueError, match=message):
        arm_step(torch.zeros(4, 8), **arguments)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors made inside and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {id(one.untyped_storage()) for one in args if isinstance(one, Tensor)}
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(one, Tensor):
                continue
            storage = one.untyped_storage()
            key = id(storage)
            if key not in self.live and key not in known:
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alignment", [0.0, 0.5])
def test_extra_memory_stays_under_two_copies(dtype: torch.dtype, alignment: float) -> None:
    generator = torch.Generator().manual_seed(18)
    weight = torch.randn(1024, 1536, generator=generator).to(dtype)
    checkpoint = torch.randn(1024, 1536, generator=generator).to(dtype)
    basis = torch.linalg.qr(torch.randn(1536, 64, generator=generator))[0]
    other = torch.linalg.qr(torch.randn(1536, 64, generator=generator))[0]
    with PeakMemory() as memory:
        result = arm_step(
            weight, [Incoming(checkpoint, 0.5, other)], basis, rotation=-0.4, alignment=alignment
        )
    assert result.nbytes <= memory.peak < 2 * weight.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
def test_cuda_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(19)
    weight = tensor(rng.standard_normal((300, 256)), dtype)
    checkpoint = tensor(rng.standard_normal((300, 256)), dtype)
    basis, other = (tensor(orthonormal(rng, 256, k), torch.float32) for k in (40, 30))
    results = [
        arm_step(
            weight.to(device),
            [Incoming(checkpoint.to(device), 0.5, other.to(device))],
            basis.to(device),
            rotation=-0.4,
            alignment=0.5,
        )
        for device in ("cpu", "cuda", "cuda")
    ]
    assert torch.equal(results[1], results[2])
    torch.testing.assert_close(results[1].cpu(), results[0])
