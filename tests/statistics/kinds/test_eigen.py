"""Leading eigenpairs against a dense decomposition in float64."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from mergekit_arm.statistics.kinds.eigen import leading_eigenpairs

WIDE = 450
"""Wider than what is decomposed whole where few vectors are asked for."""

SPECTRA = {
    "falling": lambda i: i**-1.0,
    "steep": lambda i: i**-3.0,
    "flat": torch.ones_like,
    "nearly flat": lambda i: 1 - 1e-3 * i / len(i),
    "clustered": lambda i: torch.where(i <= 40, 10.0, 1.0),
    "two clusters within those asked for": lambda i: torch.where(
        i <= 5, 100.0, torch.where(i <= 20, 10.0, 0.1)
    ),
    "geometric": lambda i: 0.5**i,
    "rank 10": lambda i: (i <= 10).double(),
    "rank 1": lambda i: (i <= 1).double(),
    "zero": torch.zeros_like,
}


def rotation(width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator).double()).Q


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    turn = rotation(len(values), seed)
    return (turn * values.double()) @ turn.T


def spectrum(name: str, width: int) -> Tensor:
    values: Tensor = SPECTRA[name](torch.arange(1, width + 1).double())
    return values


def best(moment: Tensor, count: int) -> Tensor:
    """The largest eigenvalues of the upper triangle's matrix, falling."""
    return torch.linalg.eigvalsh(moment.double(), UPLO="U").flip(0)[:count].clamp(min=0)


def symmetric(upper: Tensor) -> Tensor:
    return upper.double().triu() + upper.double().triu(1).T


def check_orthonormal(vectors: Tensor) -> None:
    eye = torch.eye(vectors.shape[1], dtype=torch.float64)
    assert (vectors.T @ vectors - eye).abs().max() < 1e-12


def check(
    moment: Tensor, values: Tensor, vectors: Tensor, share: float, *, rounding: float = 1e-12
) -> None:
    """The vectors hold ``share`` of the best, and the values are quotients that never exceed."""
    assert values.dtype == vectors.dtype == torch.float64
    assert (values.diff() <= 0).all()
    assert (values >= 0).all()
    check_orthonormal(vectors)
    wide = symmetric(moment)
    exact = best(moment, len(values))
    largest = float(exact[0])
    held = (vectors * (wide @ vectors)).sum(0)
    assert ((values - exact) <= rounding * largest).all()
    # Float32's rounding of a matrix without full rank may be negative.
    assert (held.clamp(min=0) - values).abs().max() <= rounding * largest
    for count in {1, len(values) // 2, len(values)} - {0}:
        assert float(held[:count].sum()) >= share * float(exact[:count].sum())


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("name", SPECTRA)
def test_a_whole_moment_by_iteration(name: str, scale: float) -> None:
    moment = (with_spectrum(spectrum(name, WIDE)) * scale).float()
    values, vectors = leading_eigenpairs(moment, None, 30)
    assert vectors.shape == (WIDE, 30)
    if name == "zero":
        check_orthonormal(vectors)
        assert not values.any()
    else:
        check(moment, values, vectors, 0.997)


@pytest.mark.parametrize("name", ["falling", "steep", "geometric", "rank 10"])
def test_what_falls_fast_is_found_to_many_digits(name: str) -> None:
    moment = with_spectrum(spectrum(name, WIDE)).float()
    values, _ = leading_eigenpairs(moment, None, 30)
    exact = best(moment, 30)
    assert values.sum() >= (1 - 1e-3) * exact.sum()
    torch.testing.assert_close(values[:8], exact[:8], rtol=1e-6, atol=1e-9 * float(exact[0]))


@pytest.mark.parametrize("massive", [1e2, 1e4, 1e6])
def test_a_massive_channel_does_not_hide_the_others(massive: float) -> None:
    """Its eigenvalue is the square: 1e12 times the others' is beyond float32."""
    values = spectrum("falling", WIDE)
    moment = with_spectrum(values)
    scale = torch.ones(WIDE, dtype=torch.float64)
    scale[7] = massive
    moment = (moment * scale * scale[:, None]).float()
    found, vectors = leading_eigenpairs(moment, None, 30)
    check_orthonormal(vectors)
    assert abs(float(vectors[7, 0])) > 1 - 1e-3
    exact = best(moment, 30)
    assert (found <= exact + 1e-12 * exact[0]).all()
    # What the others hold: of the matrix that is left where the massive direction is removed.
    kept = torch.eye(WIDE, dtype=torch.float64)
    leading = torch.linalg.eigh(moment.double(), UPLO="U").eigenvectors[:, -1:]
    kept -= leading @ leading.T
    rest = kept @ symmetric(moment) @ kept
    held = (vectors[:, 1:] * (rest @ vectors[:, 1:])).sum()
    assert float(held) >= 0.99 * float(best((rest + rest.T) / 2, 29).sum())


@pytest.mark.parametrize(("width", "most"), [(1, 1), (1, 5), (2, 1), (2, 2), (40, 64), (300, 30)])
def test_a_narrow_moment_is_exact(width: int, most: int) -> None:
    moment = with_spectrum(spectrum("falling", width)).float()
    values, vectors = leading_eigenpairs(moment, None, most)
    assert vectors.shape == (width, min(width, most))
    check(moment, values, vectors, 1 - 1e-12)


def test_the_lower_triangle_is_not_read() -> None:
    for width in (50, WIDE):
        moment = with_spectrum(spectrum("falling", width)).float()
        spoiled = moment.triu() + torch.full_like(moment, 9.0).tril(-1)
        for one, other in zip(
            leading_eigenpairs(spoiled, None, 10),
            leading_eigenpairs(moment.triu(), None, 10),
            strict=True,
        ):
            assert torch.equal(one, other)


def test_the_same_input_gives_the_same_bytes_and_leaves_the_generator_alone() -> None:
    moment = with_spectrum(spectrum("falling", WIDE)).float()
    before, state = moment.clone(), torch.get_rng_state()
    first = leading_eigenpairs(moment, None, 30)
    torch.manual_seed(5)
    second = leading_eigenpairs(moment, None, 30)
    torch.set_rng_state(state)
    leading_eigenpairs(moment, None, 30)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(moment, before)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("width", [200, WIDE])
def test_the_fewest_pairs_that_hold_enough(width: int, share: float) -> None:
    values = spectrum("steep", width) + spectrum("falling", width)
    moment = with_spectrum(values).float()
    exact = best(moment, width)
    enough = share * float(exact[:30].sum())
    fewest = int((exact.cumsum(0) < enough).sum()) + 1
    found, vectors = leading_eigenpairs(moment, None, 30, enough)
    assert vectors.shape == (width, len(found))
    assert float(found.sum()) >= enough
    assert float(found[:-1].sum()) < enough
    assert fewest <= len(found) <= fewest + 1
    check(moment, found, vectors, 0.997)


def test_more_than_all_hold_gives_all_asked_for() -> None:
    moment = with_spectrum(spectrum("falling", WIDE)).float()
    assert leading_eigenpairs(moment, None, 30, 1e9)[1].shape == (WIDE, 30)


@given(
    width=st.integers(1, 24),
    most=st.integers(1, 30),
    exponent=st.integers(-12, 12),
    rank=st.integers(0, 24),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
@example(width=1, most=1, exponent=0, rank=0, seed=0)
def test_any_small_moment(width: int, most: int, exponent: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rank, width, generator=generator) * 10.0 ** (exponent / 2)
    moment = x.T @ x
    values, vectors = leading_eigenpairs(moment, None, most)
    assert vectors.shape == (width, min(width, most))
    check_orthonormal(vectors)
    if rank:
        check(moment, values, vectors, 1 - 1e-6, rounding=1e-6)


@given(
    decay=st.floats(0, 4),
    massive=st.floats(1, 1e8),
    most=st.integers(1, 60),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=15, deadline=None)
@example(decay=0.03125, massive=1.0, most=2, seed=0)
@example(decay=0.0, massive=1.03, most=1, seed=3)
@example(decay=0.0, massive=1.0625, most=3, seed=0)
@example(decay=0.0, massive=1.15, most=20, seed=2)
def test_any_wide_moment(decay: float, massive: float, most: int, seed: int) -> None:
    """The worst is one eigenvalue a little above a flat spectrum, alone or among many."""
    values = torch.arange(1, 401).double() ** -decay
    values[0] *= massive
    moment = with_spectrum(values, seed).float()
    check(moment, *leading_eigenpairs(moment, None, most), 0.97)


def nystrom(sketch: Tensor, omega: Tensor) -> Tensor:
    """Y (ΩᵀY)⁺ Yᵀ by the formula, in float64."""
    y, w = sketch.double(), omega.double()
    core = w.T @ y
    inverse = torch.linalg.pinv((core + core.T) / 2, hermitian=True, rtol=1e-6)
    return y @ inverse @ y.T


def drawn(width: int, rank: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, rank, generator=generator) / width**0.5


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("name", ["falling", "flat", "clustered", "nearly flat"])
def test_a_sketch_gives_the_eigenpairs_of_nystroms_formula(name: str, scale: float) -> None:
    moment = with_spectrum(spectrum(name, 300)) * scale
    omega = drawn(300, 80)
    sketch = (moment @ omega.double()).float()
    values, vectors = leading_eigenpairs(sketch, omega, 20)
    assert vectors.shape == (300, 20)
    check(nystrom(sketch, omega), values, vectors, 1 - 1e-6, rounding=1e-6)
    # Lower bounds of the second moment's own.
    assert (values <= best(moment, 20) * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", ["steep", "geometric", "rank 10", "rank 1"])
@pytest.mark.parametrize("massive", [1.0, 1e4])
def test_a_sketch_of_what_float32_does_not_resolve(name: str, massive: float) -> None:
    """Fewer directions than asked for may be left; those left are sound."""
    values = spectrum(name, 300)
    values[0] *= massive
    moment = with_spectrum(values)
    omega = drawn(300, 80)
    sketch = (moment @ omega.double()).float()
    found, vectors = leading_eigenpairs(sketch, omega, 20)
    count = vectors.shape[1]
    assert 1 <= count <= 20
    check_orthonormal(vectors)
    assert (found <= best(moment, count) + 1e-5 * float(values[0])).all()
    held = (vectors * (moment @ vectors)).sum(0)
    assert float(held.sum()) >= 0.99 * float(best(moment, count).sum())
    if name.startswith("rank"):
        assert float(held.sum()) == pytest.approx(float(values.sum()), rel=1e-5)


def test_rows_in_float64_are_blocks_that_add_up() -> None:
    width = 4096 + 100
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, width, generator=generator) * (torch.arange(300)[:, None] + 1) ** -0.5
    omega = drawn(width, 200)
    sketch = x.T @ (x @ omega)
    values, vectors = leading_eigenpairs(sketch, omega, 25)
    core = omega.double().T @ sketch.double()
    eigen, turn = torch.linalg.eigh((core + core.T) / 2)
    left, singular, _ = torch.linalg.svd(
        sketch.double() @ (turn / eigen.sqrt()), full_matrices=False
    )
    torch.testing.assert_close(values, singular[:25].square(), rtol=1e-5, atol=0)
    check_orthonormal(vectors)
    cosines = torch.linalg.svdvals(left[:, :25].T @ vectors)
    assert cosines.min() > 1 - 1e-8


def test_a_sketch_of_nothing_has_no_directions() -> None:
    values, vectors = leading_eigenpairs(torch.zeros(30, 4), drawn(30, 4), 2)
    assert values.shape == (0,)
    assert vectors.shape == (30, 0)


@pytest.mark.parametrize(("width", "rank", "most"), [(2, 1, 1), (9, 3, 5)])
def test_a_small_sketch(width: int, rank: int, most: int) -> None:
    moment = with_spectrum(spectrum("falling", width))
    omega = drawn(width, rank)
    sketch = (moment @ omega.double()).float()
    values, vectors = leading_eigenpairs(sketch, omega, most)
    assert vectors.shape == (width, min(rank, most))
    check(nystrom(sketch, omega), values, vectors, 1 - 1e-6, rounding=1e-6)


@given(
    decay=st.floats(0, 3),
    rank=st.integers(1, 40),
    most=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_any_sketch_bounds_the_moment_from_below(
    decay: float, rank: int, most: int, seed: int
) -> None:
    moment = with_spectrum(torch.arange(1, 91).double() ** -decay, seed)
    omega = drawn(90, rank, seed)
    values, vectors = leading_eigenpairs((moment @ omega.double()).float(), omega, most)
    check_orthonormal(vectors)
    exact = best(moment, len(values))
    # Float32's rounding of the sketch, times what 1e-6 of the core's largest lets through.
    assert (values <= exact * (1 + 1e-4) + 1e-5 * float(exact[0])).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("width", [200, WIDE])
def test_a_gpu_gives_the_same_eigenvalues(width: int) -> None:
    moment = with_spectrum(spectrum("falling", width)).float()
    omega = drawn(width, 80)
    for sketch, matrix in ((moment, None), (moment @ omega, omega)):
        ours, _ = leading_eigenpairs(sketch, matrix, 20)
        theirs, vectors = leading_eigenpairs(sketch.cuda(), matrix, 20)
        assert theirs.device.type == vectors.device.type == "cpu"
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
