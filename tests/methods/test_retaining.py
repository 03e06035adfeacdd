"""The step that does not forget, against dense algebra and rotations in the plane, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mergekit_arm.methods.moments import second_moment
from mergekit_arm.methods.retaining import Retention, retaining_step, retention
from mergekit_arm.methods.step import Incoming, arm_step
from tests.support.arm_reference import REPEATABLE, orthonormal, tensor
from tests.support.memory import PeakMemory
from tests.support.moments_reference import (
    Problem,
    Stored,
    full_rank,
    of_data,
    problems,
    turned,
    wide_moment,
)

pytestmark = pytest.mark.filterwarnings("error")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def task_of(
    rows: np.ndarray, towards: Retention, turn: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[np.ndarray, int]:
    """τ' of task vectors: a step from zero at η = 1."""
    tau = tensor(rows, dtype)
    found, count = retaining_step(torch.zeros_like(tau), [Incoming(tau, 1.0)], towards, turn=turn)
    return found.double().numpy(), count


def pair(
    width: int, seed: int = 0, rank: int | None = None, alpha: float = 0.9, retain: float = 0.3
) -> Retention:
    rng = np.random.default_rng(seed)
    sites = [
        of_data(
            rng.standard_normal((90, width)) @ rng.standard_normal((width, width)), rank or width
        )
        for _ in "tg"
    ]
    return retention(sites[0].package(alpha), sites[1].package(alpha), retain=retain)


def two(problem: Problem) -> tuple[Stored, Stored]:
    task = problem.sites[0]
    return task, problem.anchor or problem.sites[-1]


@given(
    problems(),
    st.floats(0, 1) | st.sampled_from([0.0, 1.0]),
    st.sampled_from([torch.float64, torch.float32]),
)
@settings(REPEATABLE, max_examples=150)
def test_it_equals_the_reference(problem: Problem, turn: float, dtype: torch.dtype) -> None:
    task, general = two(problem)
    live = task.diagonal > 0
    assume(live.any())
    # Where one channel outweighs another 10⁶ times, little of the other's direction has digits.
    weakest = task.diagonal[live].min()
    assume(max(task.diagonal.max(), problem.retain * general.diagonal.max()) < 1e6 * weakest)
    moments = [site.package(problem.alpha) for site in (task, general)]
    rows = problem.tasks[0].astype(np.float32).astype(np.float64)
    found, _ = task_of(rows, retention(*moments, retain=problem.retain), turn, dtype)
    matrices = [site.dense(problem.alpha) for site in (task, general)]
    wanted = turned(rows, *matrices, problem.retain, turn)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    precise = dtype == torch.float64
    assert (np.abs(found - wanted) <= (1e-7 if precise else 1e-3) * lengths).all()
    kept = np.linalg.norm(found, axis=1, keepdims=True)
    np.testing.assert_allclose(kept, lengths, rtol=1e-9 if precise else 1e-5)


@given(problems(), st.floats(0, 1), st.floats(0, 3))
@settings(REPEATABLE, max_examples=60)
def test_equal_moments_leave_the_direction(problem: Problem, turn: float, retain: float) -> None:
    moment = problem.sites[0].package(problem.alpha)
    rows = problem.tasks[0] * (problem.sites[0].diagonal > 0)
    found, _ = task_of(rows, retention(moment, moment, retain=retain), turn)
    np.testing.assert_allclose(found, rows, rtol=1e-7, atol=1e-7)


def test_nothing_retained_leaves_all_that_the_task_excites() -> None:
    rng = np.random.default_rng(0)
    data, general = rng.standard_normal((40, 9)), full_rank(rng, 9).package(0.9)
    data[:, [1, 4]] = 0
    rows = rng.standard_normal((5, 9))
    found, _ = task_of(rows, retention(of_data(data, 3).package(0.9), general, retain=0.0))
    left = rows * (data.any(axis=0))
    wanted = left / np.linalg.norm(left, axis=1, keepdims=True)
    np.testing.assert_allclose(found, wanted * np.linalg.norm(rows, axis=1, keepdims=True))


def test_nothing_retained_projects_on_the_span_of_few_inputs() -> None:
    rng = np.random.default_rng(1)
    data, rows = rng.standard_normal((4, 9)), rng.standard_normal((5, 9))
    units = np.sqrt((data**2).mean(0))
    moments = of_data(data, 4).package(1.0), full_rank(rng, 9).package(1.0)
    found, _ = task_of(rows, retention(*moments, retain=0.0))
    span = np.linalg.qr((data / units).T)[0]
    left = rows * units @ span @ span.T / units
    wanted = left / np.linalg.norm(left, axis=1, keepdims=True)
    np.testing.assert_allclose(
        found, wanted * np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-5
    )


def test_the_goal_minimises_what_the_issue_of_forgetting_is() -> None:
    """‖(W' − W_c) X_t‖² + κ ‖(W' − W) X_g‖² has no better W' near W + d."""
    rng = np.random.default_rng(2)
    inputs, others = rng.standard_normal((60, 7)), rng.standard_normal((50, 7))
    row = rng.standard_normal((1, 7))
    moments = of_data(inputs, 7).package(1.0), of_data(others, 7).package(1.0)
    towards = retention(*moments, retain=0.7)
    goal = towards.solution.to(torch.device("cpu"), torch.float64).solve([tensor(row).clone()])

    def loss(change: np.ndarray) -> float:
        followed = ((change - row) @ inputs.T) ** 2
        return float(followed.mean() + 0.7 * ((change @ others.T) ** 2).mean())

    best = loss(goal.numpy())
    for _ in range(50):
        assert loss(goal.numpy() + 1e-2 * rng.standard_normal((1, 7))) > best


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_no_turn_is_task_arithmetic_to_the_bit(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(3)
    weight, one, two = (tensor(rng.standard_normal((6, 16)), dtype) for _ in range(3))
    incoming = [Incoming(one, 0.5), Incoming(two, 0.25)]
    wanted = arm_step(weight, incoming, None, rotation=0.0)
    for towards, turn in ((pair(16), 0.0), (None, 1.0)):
        found, count = retaining_step(weight, incoming, towards, turn=turn)
        assert torch.equal(found, wanted)
        assert count == 0
    vector, count = retaining_step(weight[0], [Incoming(one[0], 1.0)], pair(16))
    assert torch.equal(vector, one[0])


def test_the_angle_is_in_proportion_to_the_turn() -> None:
    rng = np.random.default_rng(4)
    rows, towards = rng.standard_normal((5, 16)), pair(16, retain=3.0)
    whole = angles(rows, task_of(rows, towards)[0])
    assert whole.min() > 0.2
    for turn in (0.1, 0.5, 0.9):
        part = task_of(rows, towards, turn)[0]
        np.testing.assert_allclose(angles(rows, part), turn * whole, rtol=1e-9)
        # In the plane of the two, and between them.
        np.testing.assert_allclose(
            angles(part, task_of(rows, towards)[0]), (1 - turn) * whole, rtol=1e-9
        )


def angles(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.arccos(np.clip((one * other).sum(1) / lengths, -1, 1))


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-9, 1.0, 1e9])
@pytest.mark.parametrize("turn", [0.4, 1.0])
def test_the_size_of_a_change_does_not_matter(scale: float, turn: float) -> None:
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((5, 16))
    plain, _ = task_of(rows, pair(16), turn)
    found, count = task_of(rows * scale, pair(16), turn, torch.float32)
    np.testing.assert_allclose(found / scale, plain, atol=1e-5)
    assert count == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_which_nothing_is_left_keep_their_direction_and_are_counted(
    dtype: torch.dtype,
) -> None:
    rng = np.random.default_rng(6)
    data, general = rng.standard_normal((40, 9)), full_rank(rng, 9)
    data[:, 5:] = 0
    towards = retention(of_data(data, 3).package(0.9), general.package(0.9), retain=0.5)
    rows = rng.standard_normal((6, 9)).astype(np.float32).astype(np.float64)
    rows[1, :5] = 0  # only where the task has no inputs
    rows[4, :5] = 0
    rows[2] = 0  # not a change at all: kept, and not counted
    rows[3, :5] *= 1e-3  # little is left of it, but something
    found, count = task_of(rows, towards, 1.0, dtype)
    assert count == 2
    np.testing.assert_allclose(found[[1, 2, 4]], rows[[1, 2, 4]], rtol=1e-6)
    assert (angles(found[[0, 3, 5]], rows[[0, 3, 5]]) > 0.05).all()
    # Counted for every checkpoint and every expert.
    tau = tensor(rows, dtype)
    incoming = [Incoming(torch.stack([tau, tau]), 0.5)] * 2
    assert retaining_step(torch.zeros(2, 6, 9, dtype=dtype), incoming, towards)[1] == 8


def test_a_task_of_no_inputs_turns_nothing() -> None:
    rows = np.random.default_rng(7).standard_normal((4, 6))
    none, some = second_moment(torch.zeros(6)), second_moment(torch.ones(6))
    assert task_of(rows, retention(none, some, retain=1.0))[1] == 4
    # Nothing measured on either text: there is no other direction.
    found, count = task_of(rows, retention(none, none, retain=1.0))
    np.testing.assert_allclose(found, rows, rtol=1e-14)
    assert count == 0


def test_coordinates_do_not_matter_for_whole_moments() -> None:
    rng = np.random.default_rng(8)
    data = [rng.standard_normal((60, 9)) @ rng.standard_normal((9, 9)) for _ in "tg"]
    rows, turn = rng.standard_normal((5, 9)), orthonormal(rng, 9, 9)

    def step(data: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
        moments = [of_data(one, 9).package(1.0) for one in data]
        return task_of(rows, retention(*moments, retain=0.3), 0.8)[0]

    again = step([one @ turn for one in data], rows @ turn)
    np.testing.assert_allclose(again, step(data, rows) @ turn, atol=1e-4)


def test_updates_of_several_checkpoints_add() -> None:
    rng = np.random.default_rng(9)
    weight, one, two = (tensor(rng.standard_normal((7, 16))) for _ in range(3))
    towards = pair(16, rank=5)
    both, _ = retaining_step(
        weight, [Incoming(one, 0.5), Incoming(two, 1.5), Incoming(one, 0.0)], towards, turn=0.7
    )
    alone = [
        retaining_step(weight, [Incoming(model, rate)], towards, turn=0.7)[0] - weight
        for model, rate in ((one, 0.5), (two, 1.5))
    ]
    torch.testing.assert_close(both, weight + alone[0] + alone[1])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("turn", [0.5, 1.0])
def test_equal_checkpoints_give_the_weight_bit_for_bit(dtype: torch.dtype, turn: float) -> None:
    weight = tensor(np.random.default_rng(10).standard_normal((6, 16)), dtype)
    weight[0, 0], weight[1, 1] = -0.0, 0.0
    for incoming in ([Incoming(weight.clone(), 0.7)] * 2, []):
        found, count = retaining_step(weight, incoming, pair(16), turn=turn)
        assert torch.equal(found, weight)
        assert torch.equal(found.signbit(), weight.signbit())
        assert count == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_half_precision_is_the_float32_result_rounded_once(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(11)
    weight, one = (tensor(rng.standard_normal((40, 24)), dtype) for _ in range(2))
    half, _ = retaining_step(weight, [Incoming(one, 0.5)], pair(24, rank=6), turn=0.6)
    full, _ = retaining_step(
        weight.float(), [Incoming(one.float(), 0.5)], pair(24, rank=6), turn=0.6
    )
    assert half.dtype == dtype
    assert torch.equal(half, full.to(dtype))


def test_inputs_along_the_first_axis() -> None:
    rng = np.random.default_rng(12)
    weight, one = (tensor(rng.standard_normal((10, 24)), torch.bfloat16) for _ in range(2))
    usual, _ = retaining_step(weight, [Incoming(one, 0.5)], pair(24))
    stored, _ = retaining_step(
        weight.T.clone(), [Incoming(one.T.clone(), 0.5)], pair(24), input_axis=0
    )
    assert torch.equal(stored, usual.T)


def test_experts_have_moments_of_their_own() -> None:
    rng = np.random.default_rng(13)
    weight, one = (tensor(rng.standard_normal((3, 5, 12))) for _ in range(2))
    diagonals = [tensor(rng.random((3, 12))) for _ in "tg"]
    towards = retention(*[second_moment(d) for d in diagonals], retain=0.4)
    fused, _ = retaining_step(weight, [Incoming(one, 0.5)], towards)
    for expert in range(3):
        own = retention(*[second_moment(d[expert]) for d in diagonals], retain=0.4)
        single, _ = retaining_step(weight[expert], [Incoming(one[expert], 0.5)], own)
        torch.testing.assert_close(fused[expert], single)


def test_nothing_given_is_changed() -> None:
    rng = np.random.default_rng(14)
    weight, one = (tensor(rng.standard_normal((7, 16))) for _ in range(2))
    copies = weight.clone(), one.clone()
    retaining_step(weight, [Incoming(one, 0.5)], pair(16), turn=0.5)
    assert torch.equal(weight, copies[0])
    assert torch.equal(one, copies[1])


@pytest.mark.parametrize("turn", [-0.1, 1.1, math.nan])
def test_a_turn_out_of_range_is_named(turn: float) -> None:
    with pytest.raises(ValueError, match="turn must lie in"):
        retaining_step(torch.ones(2, 16), [], None, turn=turn)


@pytest.mark.parametrize("shape", [(4, 17), (3, 16, 4)])
def test_another_width_is_named(shape: tuple[int, ...]) -> None:
    weight = torch.ones(shape)
    with pytest.raises(ValueError, match="least squares for tasks"):
        retaining_step(weight, [Incoming(weight, 1.0)], pair(16))


def test_extra_memory_stays_small_against_the_inputs() -> None:
    weight, one = torch.randn(2, 2048, 1536).bfloat16()
    one_site, other = wide_moment(0), wide_moment(1)
    towards = retention(one_site, other, retain=0.3)
    with PeakMemory() as memory:
        found, _ = retaining_step(weight, [Incoming(one, 0.5)], towards, turn=0.5)
    assert found.nbytes <= memory.peak < found.nbytes + 0.75 * weight.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
def test_cuda_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(19)
    weight, one = (tensor(rng.standard_normal((300, 256)), dtype) for _ in range(2))
    towards = pair(256, rank=40)
    here, _ = retaining_step(weight, [Incoming(one, 0.5)], towards, turn=0.5)
    there, _ = retaining_step(weight.cuda(), [Incoming(one.cuda(), 0.5)], towards, turn=0.5)
    torch.testing.assert_close(there.cpu(), here)
