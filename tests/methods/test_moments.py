"""Least squares under second moments, against dense algebra of other make, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mergekit_arm.methods.moments import (
    LeastSquares,
    SecondMoment,
    least_squares,
    plain_average,
    second_moment,
)
from tests.support.arm_reference import REPEATABLE, orthonormal, tensor
from tests.support.moments_reference import Problem, Stored, full_rank, of_data, problems

pytestmark = pytest.mark.filterwarnings("error")

CPU = torch.device("cpu")


def dense(moment: SecondMoment) -> np.ndarray:
    low = torch.zeros(0) if moment.factor is None else moment.factor.double()
    matrix = torch.diag(moment.remainder)
    return (matrix if moment.factor is None else matrix + low @ low.T).numpy()


@given(problems())
@settings(REPEATABLE, max_examples=200)
def test_a_moment_is_what_the_definition_says(problem: Problem) -> None:
    for site in problem.sites:
        moment = site.package(problem.alpha)
        units = np.sqrt(np.where(site.diagonal > 0, site.diagonal, 1))
        found, wanted = (
            one / np.outer(units, units) for one in (dense(moment), site.dense(problem.alpha))
        )
        # A remainder of less than a millionth is rounding, and taken as none.
        np.testing.assert_allclose(found, wanted, atol=2e-6)
        assert (moment.remainder >= 0).all()


@given(problems())
@settings(REPEATABLE, max_examples=400)
def test_solutions_equal_the_least_squares_of_data(problem: Problem) -> None:
    assert problem.error(problem.solve(), problem.reference()) < 1e-11


@given(problems())
@settings(REPEATABLE, max_examples=200)
def test_float32_is_as_good_as_its_digits(problem: Problem) -> None:
    assert problem.error(problem.solve(torch.float32), problem.reference()) < 2e-6


def test_wide_inputs_are_taken_in_parts() -> None:
    rng = np.random.default_rng(0)
    # Wider than the block of channels that is in float64 at once.
    width, tokens = 2500, 40
    data = [rng.standard_normal((tokens, width)) for _ in range(3)]
    sites = [of_wide_data(one, rank) for one, rank in zip(data, (12, 0, 30), strict=True)]
    tasks = [rng.standard_normal((3, width)) for _ in range(2)]
    problem = Problem(sites[:2], [1.0, 0.4], tasks, 0.9, sites[2], 0.5, 1e-3)
    whole = sum(w * site.dense_fast(0.9) for w, site in zip((1.0, 0.4, 0.5), sites, strict=True))
    whole = whole + 1e-3 * np.diag(whole).mean() * np.eye(width)
    right = sum(
        w * task @ site.dense_fast(0.9)
        for w, task, site in zip((1.0, 0.4), tasks, sites[:2], strict=True)
    )
    np.testing.assert_allclose(problem.solve(), np.linalg.solve(whole, right.T).T, atol=1e-10)


class _Wide(Stored):
    def dense_fast(self, alpha: float) -> np.ndarray:
        low = (self.basis * self.eigenvalues) @ self.basis.T
        return alpha * low + np.diag(self.diagonal - alpha * np.diag(low))


def of_wide_data(data: np.ndarray, rank: int) -> _Wide:
    _, singular, right = np.linalg.svd(data, full_matrices=False)
    values = singular[:rank] ** 2 / len(data)
    return _Wide((data**2).mean(0), right[:rank].T, values)


@given(problems(), st.floats(0.01, 3))
@settings(REPEATABLE, max_examples=60)
def test_equal_moments_give_the_plain_average(problem: Problem, weight: float) -> None:
    count = len(problem.sites)
    problem.sites = problem.sites[:1] * count
    problem.weights = [weight * (1 + i) for i in range(count)]
    problem.anchor, problem.ridge = None, 0.0
    shares = plain_average(problem.weights).to(CPU, torch.float64)
    average = shares.solve([tensor(task).clone() for task in problem.tasks]).numpy()
    wanted = sum((1 + i) * task for i, task in enumerate(problem.tasks)) / (count * (count + 1) / 2)
    np.testing.assert_allclose(average, wanted, atol=1e-14)
    live = problem.sites[0].diagonal > 0
    assume(live.any())
    assert problem.error(problem.solve(), np.where(live, average, 0)) < 1e-12


@given(problems())
@settings(REPEATABLE, max_examples=60)
def test_one_model_and_identical_models_give_that_model_exactly(problem: Problem) -> None:
    problem.sites, problem.weights, problem.tasks = (
        problem.sites[:1], [1.7], problem.tasks[:1],
    )  # fmt: skip
    problem.anchor, problem.ridge = None, 0.0
    live = problem.sites[0].diagonal > 0
    assume(live.any())
    wanted = np.where(live, problem.tasks[0], 0)
    assert np.array_equal(problem.solve(), wanted)
    # The same change in several models that differ in their inputs.
    other = Stored(problem.sites[0].diagonal * 3 + live, np.zeros((len(live), 0)), np.zeros(0))
    problem.sites, problem.weights, problem.tasks = (
        [problem.sites[0], other], [0.3, 2.0], problem.tasks * 2,
    )  # fmt: skip
    assert problem.error(problem.solve(), wanted) < 1e-14


@given(problems(), st.integers(0, 2**32 - 1))
@settings(REPEATABLE, max_examples=60)
def test_a_model_of_weight_zero_has_no_say(problem: Problem, seed: int) -> None:
    plain = problem.solve()
    task = np.random.default_rng(seed).standard_normal(problem.tasks[0].shape)
    problem.sites.append(problem.sites[0])
    problem.weights.append(0.0)
    problem.tasks.append(1e6 * task)
    assert np.array_equal(problem.solve(), plain)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("rank", [0, 3, 9])
def test_channels_that_are_zero_everywhere_keep_the_base(rank: int, ridge: float) -> None:
    rng = np.random.default_rng(1)
    data = [rng.standard_normal((50, 9)) for _ in range(2)]
    for one in data:
        one[:, [2, 5]] = 0
    sites = [of_data(one, rank) for one in data]
    # What is left of rounding in a basis must not matter either.
    for site in sites:
        site.basis[2] += 1e-3
    problem = Problem(sites, [1.0, 1.0], [rng.standard_normal((4, 9)) for _ in data], 0.9)
    problem.ridge = ridge
    found = problem.solve()
    assert (found[:, [2, 5]] == 0).all()
    assert (found[:, [0, 1, 3, 4, 6, 7, 8]] != 0).all()


def test_a_channel_that_only_one_model_excites_is_that_models() -> None:
    rng = np.random.default_rng(2)
    one, two = rng.standard_normal((50, 6)), rng.standard_normal((50, 6))
    one[:, 3] = 0
    sites = [of_data(one, 0), of_data(two, 0)]
    problem = Problem(sites, [1.0, 1.0], [rng.standard_normal((4, 6)) for _ in sites], 0.9)
    assert np.array_equal(problem.solve()[:, 3], problem.tasks[1][:, 3])


def test_diagonals_alone_are_weighted_by_each_channels_energy() -> None:
    diagonals, weights = [[4.0, 1.0, 0.0], [1.0, 1.0, 2.0]], [0.5, 2.0]
    tasks = [[[1.0, -2.0, 3.0]], [[5.0, 7.0, 11.0]]]
    solution = least_squares(
        [second_moment(torch.tensor(d)) for d in diagonals], weights, ridge=0.1
    )
    ridge = 0.1 * sum(w * x for w, d in zip(weights, diagonals, strict=True) for x in d) / 3
    found = solution.to(CPU, torch.float64).solve([torch.tensor(t).double() for t in tasks])
    for j in range(3):
        top = sum(weights[i] * diagonals[i][j] * tasks[i][0][j] for i in range(2))
        bottom = sum(weights[i] * diagonals[i][j] for i in range(2)) + ridge
        assert float(found[0, j]) == pytest.approx(top / bottom, rel=1e-12)


def test_experts_are_solved_by_themselves_and_a_starved_one_is_averaged() -> None:
    rng = np.random.default_rng(3)
    diagonals = rng.random((2, 3, 5))
    diagonals[:, 1] = 0  # no model has sent it a token
    diagonals[0, 2] = 0  # one model has not
    weights = [1.0, 3.0]
    solution = least_squares([second_moment(tensor(d)) for d in diagonals], weights, ridge=1e-2)
    tasks = rng.standard_normal((2, 4, 5))

    def solved(one: LeastSquares) -> np.ndarray:
        return one.solve([tensor(task).clone() for task in tasks]).numpy()

    for expert in (0, 2):
        alone = least_squares(
            [second_moment(tensor(d[expert])) for d in diagonals], weights, ridge=1e-2
        )
        np.testing.assert_allclose(solved(solution.of_expert(expert)), solved(alone), rtol=1e-14)
    wanted = (tasks[0] + 3 * tasks[1]) / 4
    np.testing.assert_allclose(solved(solution.of_expert(1)), wanted, rtol=1e-14)
    assert solution.of_expert(0).of_expert(0) is not None


@pytest.mark.parametrize("width", [3, 12])
def test_coordinates_do_not_matter_for_whole_moments(width: int) -> None:
    rng = np.random.default_rng(4)
    data = [rng.standard_normal((60, width)) @ rng.standard_normal((width, width)) for _ in "abc"]
    tasks = [rng.standard_normal((5, width)) for _ in "ab"]
    turn = orthonormal(rng, width, width)

    def solve(data: list[np.ndarray], tasks: list[np.ndarray]) -> np.ndarray:
        sites = [of_data(one, width) for one in data]
        return Problem(sites[:2], [1.0, 0.7], tasks, 1.0, sites[2], 0.3, 1e-4).solve()

    plain = solve(data, tasks)
    again = solve([one @ turn for one in data], [one @ turn for one in tasks])
    np.testing.assert_allclose(again, plain @ turn, atol=1e-4)
    # Less than whole moments do depend on them: the test could fail.
    sites = [of_data(one @ turn, 1) for one in data]
    rotated = Problem(sites[:2], [1.0, 0.7], [one @ turn for one in tasks], 1.0).solve()
    sites = [of_data(one, 1) for one in data]
    assert np.abs(rotated - Problem(sites[:2], [1.0, 0.7], tasks, 1.0).solve() @ turn).max() > 0.01


def test_it_is_regmean_without_a_base() -> None:
    """W = (Σ G_i)⁻¹ Σ G_i W_i on weights, whatever base the task vectors are taken from."""
    rng = np.random.default_rng(5)
    data = [rng.standard_normal((90, 14)) @ rng.standard_normal((14, 14)) for _ in range(3)]
    models = [rng.standard_normal((6, 14)) for _ in data]
    base = rng.standard_normal((6, 14))
    grams = [one.T @ one for one in data]
    wanted = np.linalg.solve(
        sum(grams), sum(g @ model.T for g, model in zip(grams, models, strict=True))
    ).T
    sites = [of_data(one, 14) for one in data]
    problem = Problem(sites, [1.0] * 3, [model - base for model in models], 1.0, ridge=1e-12)
    np.testing.assert_allclose(base + problem.solve(), wanted, atol=1e-4)
    # Their shrinking of everything off the diagonal.
    shrunk = [0.9 * g + 0.1 * np.diag(np.diag(g)) for g in grams]
    wanted = np.linalg.solve(
        sum(shrunk), sum(g @ model.T for g, model in zip(shrunk, models, strict=True))
    ).T
    problem.alpha = 0.9
    np.testing.assert_allclose(base + problem.solve(), wanted, atol=1e-9)


def test_directions_that_no_input_has_keep_the_base() -> None:
    rng = np.random.default_rng(6)
    data = rng.standard_normal((5, 12))
    task = rng.standard_normal((4, 12))
    problem = Problem([of_data(data, 5)], [1.0], [task], 1.0)
    found, units = problem.solve(), np.sqrt((data**2).mean(0))
    # What comes out for inputs that were seen is the model's; the rest is as short as it can be,
    # in units in which all channels are excited alike, or with a ridge in plain ones.
    np.testing.assert_allclose(found @ data.T, task @ data.T, atol=1e-5)
    span = np.linalg.qr((data / units).T)[0]
    np.testing.assert_allclose(found * units, task * units @ span @ span.T, atol=1e-5)
    problem.ridge = 1e-5
    span = np.linalg.qr(data.T)[0]
    np.testing.assert_allclose(problem.solve(), task @ span @ span.T, atol=1e-3)


@given(problems(), st.floats(0.1, 10))
@settings(REPEATABLE, max_examples=60)
def test_units_do_not_matter(problem: Problem, unit: float) -> None:
    plain = problem.solve()
    for site in {id(one): one for one in [*problem.sites, problem.anchor] if one}.values():
        site.diagonal, site.eigenvalues = site.diagonal * unit, site.eigenvalues * unit
    assert problem.error(problem.solve(), plain) < 1e-11


def test_a_sample_that_disagrees_keeps_the_diagonal_and_the_correlations() -> None:
    rng = np.random.default_rng(7)
    data = rng.standard_normal((4000, 8)) @ rng.standard_normal((8, 8))
    site = of_data(data, 8, sample=20)
    moment = site.package(1.0)
    low = (site.basis * site.eigenvalues) @ site.basis.T
    over = np.diag(low) > site.diagonal
    assert 0 < over.sum() < 8
    matrix = dense(moment)
    np.testing.assert_allclose(np.diag(matrix), site.diagonal, rtol=1e-12)
    assert np.linalg.eigvalsh(matrix).min() > -1e-12
    for i, j in zip(*np.triu_indices(8, 1), strict=True):
        # Correlations of channels that were both scaled are the sample's own.
        if over[i] and over[j]:
            sampled = low[i, j] / math.sqrt(low[i, i] * low[j, j])
            found = matrix[i, j] / math.sqrt(matrix[i, i] * matrix[j, j])
            assert found == pytest.approx(sampled, rel=1e-9)


def test_a_basis_in_half_precision_stays_positive_definite() -> None:
    rng = np.random.default_rng(8)
    site = full_rank(rng, 64)
    basis = tensor(site.basis, torch.bfloat16)
    moment = second_moment(
        tensor(site.diagonal), basis, tensor(site.eigenvalues, torch.float32), alpha=0.9
    )
    assert moment.factor is not None
    assert moment.factor.dtype == torch.float32
    matrix = dense(moment)
    assert np.linalg.eigvalsh(matrix).min() > 0.099 * site.diagonal.min()
    np.testing.assert_allclose(np.diag(matrix), site.diagonal, rtol=1e-9)
    np.testing.assert_allclose(matrix, site.dense(0.9), atol=0.02 * site.diagonal.max())


def test_nothing_given_is_changed_but_the_tasks() -> None:
    site = full_rank(np.random.default_rng(9), 6)
    given = [torch.from_numpy(one) for one in (site.diagonal, site.basis, site.eigenvalues)]
    copies = [one.clone() for one in given]
    moment = second_moment(*given, alpha=0.9)
    held = [moment.diagonal.clone(), moment.remainder.clone(), dense(moment)]
    solution = least_squares([moment, moment], [1.0, 2.0], anchor=moment, retain=0.5)
    solution.solve([torch.ones(2, 6).double(), torch.ones(2, 6).double()])
    assert all(torch.equal(one, copy) for one, copy in zip(given, copies, strict=True))
    assert torch.equal(moment.diagonal, held[0])
    assert torch.equal(moment.remainder, held[1])
    assert np.array_equal(dense(moment), held[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.1}, "alpha must lie in"),
        ({"alpha": math.nan}, "alpha must lie in"),
        ({"diagonal": torch.tensor([1.0, -1.0, 1.0])}, "diagonal of a second moment"),
        ({"diagonal": torch.tensor([1.0, math.inf, 1.0])}, "diagonal of a second moment"),
        ({"eigenvalues": torch.tensor([1.0, math.nan])}, "eigenvalues of a second moment"),
        ({"eigenvalues": torch.ones(3)}, "do not fit"),
        ({"diagonal": torch.ones(4)}, "do not fit"),
        ({"diagonal": torch.ones(2, 3)}, "do not fit"),
    ],
)
def test_bad_moments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "diagonal": torch.ones(3),
        "basis": torch.eye(3)[:, :2],
        "eigenvalues": torch.ones(2),
    } | changes
    with pytest.raises(ValueError, match=message):
        second_moment(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [-1.0]}, "a weight must be finite and not negative"),
        ({"weights": [math.nan]}, "a weight must be finite and not negative"),
        ({"retain": -0.1}, "retain must be"),
        ({"ridge": math.inf}, "ridge must be"),
        ({"anchor": second_moment(torch.ones(4))}, "shapes"),
        ({"anchor": second_moment(torch.ones(2, 3))}, "shapes"),
    ],
)
def test_bad_sums_are_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"weights": [1.0]} | changes
    with pytest.raises(ValueError, match=message):
        least_squares([second_moment(torch.ones(3))], **arguments)
