"""The ARM kernel against a float64 reference of explicit loops and explicit in × in matrices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings

from mergekit_arm.methods.alignment import align, principal_planes
from mergekit_arm.methods.step import Incoming, arm_step
from tests.support.arm_reference import (
    REPEATABLE,
    kernel,
    orthonormal,
    problems,
    reference,
    tensor,
)
from tests.support.memory import PeakMemory

pytestmark = pytest.mark.filterwarnings("error")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


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
    # Projections add up whole rows, of length 14: their error is a share of that.
    torch.testing.assert_close(permuted, result[order], rtol=1e-6, atol=1e-5)
    again = arm_step(weight, [Incoming(checkpoint, 0.5)], basis, rotation=-0.4)
    assert torch.equal(again, result)


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
        torch.testing.assert_close(fused[expert], single, rtol=1e-12, atol=1e-12)


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
