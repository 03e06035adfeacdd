"""RegMean's step on one weight: what is around the least squares of ``test_moments.py``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergekit_arm.methods.moments import LeastSquares, least_squares, plain_average, second_moment
from mergekit_arm.methods.regression import regression_step
from tests.support.arm_reference import REPEATABLE, tensor
from tests.support.memory import PeakMemory
from tests.support.moments_reference import Problem, full_rank, of_data, problems, wide_moment

pytestmark = pytest.mark.filterwarnings("error")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def example(rows: int, width: int, seed: int = 0, rank: int = 4) -> tuple[Tensor, list[Tensor]]:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, width))
    models = [weight + 0.1 * rng.standard_normal((rows, width)) for _ in range(2)]
    return tensor(weight), [tensor(model) for model in models]


def solution(width: int, rank: int = 4, **options: float) -> LeastSquares:
    rng = np.random.default_rng(99)
    mixed = [rng.standard_normal((70, width)) @ rng.standard_normal((width, width)) for _ in "ab"]
    sites = [of_data(one, rank) for one in mixed]
    return least_squares([site.package(0.9) for site in sites], [1.0, 0.5], **options)


@given(problems(), st.floats(0.1, 2))
@settings(REPEATABLE, max_examples=100)
def test_the_step_is_the_solution_scaled(problem: Problem, scale: float) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal(problem.tasks[0].shape)
    models = [tensor(weight + task) for task in problem.tasks]
    found = regression_step(tensor(weight), models, problem.package(), scale=scale)
    wanted = weight + scale * problem.reference()
    assert problem.error(found.numpy(), wanted) < 1e-11 * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("dtype", FLOATS)
def test_half_precision_is_the_float32_result_rounded_once(dtype: torch.dtype) -> None:
    weight, models = example(40, 24)
    weight, models = weight.to(dtype), [model.to(dtype) for model in models]
    half = regression_step(weight, models, solution(24))
    full = regression_step(weight.float(), [model.float() for model in models], solution(24))
    assert half.dtype == dtype
    assert torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_one_model_at_full_scale_is_that_model(dtype: torch.dtype) -> None:
    weight, (model, _) = example(40, 24)
    weight, model = weight.to(dtype), model.to(dtype)
    moment = full_rank(np.random.default_rng(0), 24).package(0.9)
    found = regression_step(weight, [model], least_squares([moment], [3.0]))
    # W + (W_1 − W): W_1 up to one rounding.
    torch.testing.assert_close(found, model, rtol=1e-6, atol=torch.finfo(dtype).eps)
    if dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(found, model)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_equal_models_or_no_scale_give_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    weight, models = example(6, 16)
    weight = weight.to(dtype)
    weight[0, 0], weight[1, 1] = -0.0, 0.0
    anchor = full_rank(np.random.default_rng(0), 16).package(0.9)
    for towards in (solution(16), solution(16, anchor=anchor, retain=0.3), solution(16, rank=16)):
        for others, scale in (([weight.clone()] * 2, 0.7), ([m.to(dtype) for m in models], 0.0)):
            found = regression_step(weight, others, towards, scale=scale)
            assert found.data_ptr() != weight.data_ptr()
            assert torch.equal(found, weight)
            assert torch.equal(found.signbit(), weight.signbit())


def test_no_weight_at_all_gives_the_base() -> None:
    weight, models = example(6, 16)
    moment = full_rank(np.random.default_rng(0), 16).package(0.9)
    for towards in (least_squares([moment] * 2, [0.0, 0.0]), plain_average([0.0, 0.0])):
        assert torch.equal(regression_step(weight, models, towards), weight)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 5)])
def test_weights_without_moments_are_averaged(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, one, two = (torch.randn(shape, generator=generator) for _ in range(3))
    found = regression_step(weight, [one, two], plain_average([1.0, 3.0]), scale=0.5)
    torch.testing.assert_close(found, weight + 0.5 * ((one + 3 * two) / 4 - weight))


@pytest.mark.parametrize("shape", [(0, 16), (5, 0), (2, 0, 16), (0, 4, 16)])
def test_empty_weights(shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape)
    assert regression_step(weight, [weight], plain_average([1.0])).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_along_the_first_axis(dtype: torch.dtype) -> None:
    weight, models = example(10, 24)
    weight, models = weight.to(dtype), [model.to(dtype) for model in models]
    usual = regression_step(weight, models, solution(24))
    stored = regression_step(
        weight.T.clone(), [model.T.clone() for model in models], solution(24), input_axis=0
    )
    assert stored.is_contiguous()
    assert torch.equal(stored, usual.T)


@pytest.mark.parametrize("input_axis", [-1, 1, 2])
def test_experts_have_diagonals_of_their_own(input_axis: int) -> None:
    rng = np.random.default_rng(13)
    weight, *models = (tensor(rng.standard_normal((3, 12, 12))) for _ in range(3))
    diagonals = [tensor(rng.random((3, 12))) for _ in models]
    towards = least_squares([second_moment(one) for one in diagonals], [1.0, 2.0], ridge=0.1)
    fused = regression_step(weight, models, towards, input_axis=input_axis)
    for expert in range(3):
        single = regression_step(
            weight[expert],
            [model[expert] for model in models],
            least_squares([second_moment(one[expert]) for one in diagonals], [1.0, 2.0], ridge=0.1),
            input_axis=0 if input_axis == 1 else 1,
        )
        torch.testing.assert_close(fused[expert], single, rtol=1e-13, atol=1e-13)


def test_experts_may_share_one_moment() -> None:
    rng = np.random.default_rng(14)
    weight, *models = (tensor(rng.standard_normal((3, 5, 12))) for _ in range(3))
    fused = regression_step(weight, models, solution(12))
    for expert in range(3):
        single = regression_step(weight[expert], [m[expert] for m in models], solution(12))
        assert torch.equal(fused[expert], single)


def test_rows_are_independent_across_blocks_and_repeat_to_the_bit() -> None:
    weight, models = example(3000, 96)
    weight, models = weight.float(), [model.float() for model in models]
    order = torch.from_numpy(np.random.default_rng(10).permutation(3000))
    found = regression_step(weight, models, solution(96))
    permuted = regression_step(weight[order], [model[order] for model in models], solution(96))
    torch.testing.assert_close(permuted, found[order], rtol=1e-6, atol=1e-6)
    assert torch.equal(regression_step(weight, models, solution(96)), found)


def test_views_are_taken_and_nothing_given_is_changed() -> None:
    whole, models = example(60, 48)
    weight, models = whole.float()[::2, ::2], [model.float()[::2, ::2] for model in models]
    towards = solution(24)
    given = [weight, *models, towards.shares, *[one for one in towards.factors if one is not None]]
    copies = [one.clone() for one in given]
    found = regression_step(weight, models, towards)
    dense = regression_step(copies[0], copies[1:3], towards)
    assert torch.equal(found, dense)
    assert all(torch.equal(one, copy) for one, copy in zip(given, copies, strict=True))


@pytest.mark.parametrize(
    ("shape", "axis", "others", "message"),
    [
        ((4, 8), -1, 1, "least squares for tasks"),
        ((4, 9), -1, 2, "least squares for tasks"),
        ((4, 8), 0, 2, "least squares for tasks"),
        ((8,), -1, 2, None),
        ((8, 4, 2), 0, 2, "one of the last two"),
        ((2, 2, 2, 8), -1, 2, "of at most three axes"),
    ],
)
def test_what_does_not_fit_is_named(
    shape: tuple[int, ...], axis: int, others: int, message: str | None
) -> None:
    weight = torch.zeros(shape)
    if message is None:
        regression_step(weight, [weight] * others, solution(8), input_axis=axis)
        return
    with pytest.raises(ValueError, match=message):
        regression_step(weight, [weight] * others, solution(8), input_axis=axis)


def test_other_shapes_and_lost_experts_are_named() -> None:
    weight = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="checkpoints have shapes"):
        regression_step(weight, [weight, weight.T], solution(8))
    experts = least_squares([second_moment(torch.ones(3, 8))], [1.0])
    for other in (weight, torch.zeros(2, 4, 8)):
        with pytest.raises(ValueError, match="least squares for tasks, experts and inputs"):
            regression_step(other, [other], experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_memory_stays_small_against_the_inputs(dtype: torch.dtype) -> None:
    weight, models = example(2048, 1536)
    weight, models = weight.to(dtype), [model.to(dtype) for model in models]
    towards = least_squares([wide_moment(0), wide_moment(1)], [1.0, 0.5])
    with PeakMemory() as memory:
        found = regression_step(weight, models, towards)
    # The result, and less than a quarter of what a merge of two models holds anyway.
    assert found.nbytes <= memory.peak < found.nbytes + 0.5 * weight.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
def test_cuda_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    weight, models = example(300, 256)
    weight, models = weight.to(dtype), [model.to(dtype) for model in models]
    here = regression_step(weight, models, solution(256, rank=30))
    there = regression_step(
        weight.cuda(), [model.cuda() for model in models], solution(256, rank=30)
    )
    torch.testing.assert_close(there.cpu(), here)
