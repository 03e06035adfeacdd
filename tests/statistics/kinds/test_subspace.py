"""The subspace sketch against the exact second moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_arm.errors import InputError
from mergekit_arm.statistics.kinds.second_moment import (
    columns_for_energy,
    default_rank,
    dominant_subspace,
    orthonormal,
    sketch_matrix,
    stored_directions,
)
from mergekit_arm.statistics.kinds.subspace import Subspace, SubspaceSketch

CPU = torch.device("cpu")
WIDTH = 300


def activations(tokens: int, width: int = WIDTH, seed: int = 0, decay: float = 0.8) -> Tensor:
    """Inputs like a language model's: a falling spectrum, a mean, one massive channel."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    x = torch.randn(tokens, width, generator=generator)
    x = x * torch.arange(1, width + 1).float().pow(-decay) @ turn.T + 0.05
    x[:, 7] *= 30
    return x


def exact(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C, and its eigenpairs by falling eigenvalue, by the textbook in float64."""
    moment = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for row in x.double():
        moment += torch.outer(row, row)
    moment /= x.shape[0]
    values, vectors = torch.linalg.eigh(moment)
    return moment, values.flip(0), vectors.flip(1)


def observed(x: Tensor, batch: int = 512, **settings: Any) -> SubspaceSketch:
    observer = Subspace(**settings).observer(x.shape[1], CPU)
    for rows in x.split(batch):
        observer.update(rows)
    return observer


def captured(moment: Tensor, basis: Tensor) -> float:
    return float(torch.trace(basis.T @ moment @ basis))


def largest_angle(one: Tensor, other: Tensor) -> float:
    """The largest principal angle, radians, from its sine: exact for small angles."""
    return float(torch.linalg.matrix_norm(one - other @ (other.T @ one), ord=2).clamp(max=1).asin())


def test_a_sketch_captures_the_leading_directions() -> None:
    x = activations(4000)
    moment, values, _ = exact(x)
    found = observed(x, rank=128, energy=1.0).dominant()
    assert found.basis.shape[1] == 32
    for k in (1, 8, 32):
        assert captured(moment, found.basis[:, :k]) >= 0.99 * float(values[:k].sum())


def test_a_rank_of_half_the_width_is_the_exact_second_moment() -> None:
    x = activations(2000)
    moment, values, vectors = exact(x)
    observer = observed(x, rank=WIDTH // 2, energy=0.97)
    half = observer.sums["sketch"].double().triu() / 2000
    # Sums of products of either sign: their error is a share of the products, not of the sum.
    products = moment.diagonal().sqrt().outer(moment.diagonal().sqrt())
    assert ((half - moment.triu()).abs() <= 1e-5 * products).all()
    found = observer.dominant()
    k = found.basis.shape[1]
    assert largest_angle(found.basis, vectors[:, :k]) < 1e-3
    largest = float(values[0])
    torch.testing.assert_close(found.eigenvalues, values[:k], rtol=1e-5, atol=1e-6 * largest)
    # k is the fewest directions with 0.97 of the trace.
    share = values.cumsum(0) / moment.trace()
    assert share[k - 2] < 0.97 <= share[k - 1]


def test_principal_angles_shrink_with_the_rank() -> None:
    x = activations(4000)
    vectors = exact(x)[2][:, :8]
    angles = [
        largest_angle(observed(x, rank=rank, energy=1.0).dominant().basis[:, :8], vectors)
        for rank in (20, 64, 149, 150)
    ]
    assert angles == sorted(angles, reverse=True)
    assert angles[1] < 0.1
    assert angles[3] < 1e-3


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("rank", [100, 149, 150])
def test_the_basis_truly_holds_the_energy_asked_for(energy: float, rank: int) -> None:
    """k comes from the exact trace; the sketch's eigenvalues are lower bounds."""
    x = activations(4000)
    moment, values, _ = exact(x)
    found = observed(x, rank=rank, energy=energy).dominant()
    assert found.reached
    assert captured(moment, found.basis) >= energy * float(moment.trace()) * (1 - 1e-6)
    assert found.energy >= energy * (1 - 1e-6)
    k = len(found.eigenvalues)
    assert (found.eigenvalues <= values[:k] * (1 + 1e-5) + 1e-6 * values[0]).all()
    assert found.trace == pytest.approx(float(moment.trace()), rel=1e-6)
    assert found.tokens == 4000
    # No column more than needed, but for what the sketch underestimates.
    fewest = int((values.cumsum(0) < energy * moment.trace()).sum()) + 1
    assert fewest <= k <= fewest * 1.35 + 2


def test_a_rank_too_small_for_the_energy_says_so() -> None:
    x = activations(3000, decay=0.2)
    found = observed(x, rank=10, energy=0.97).dominant()
    assert not found.reached
    assert found.basis.shape == (
        WIDTH,
        2,
    )  # a quarter of the columns: the others are poorly resolved
    assert found.energy < 0.97


@pytest.mark.parametrize("rank", [40, 150])
def test_batches_files_and_resumed_runs_add_up(rank: int) -> None:
    x = activations(900)
    whole, first, second, resumed, combined = (
        Subspace(rank=rank).observer(WIDTH, CPU) for _ in range(5)
    )
    whole.update(x)
    first.update(x[:200])
    second.update(x[200:])
    resumed.load_state(first.state())
    for rows in x[200:].split(90):
        resumed.update(rows)
    combined.load_state({key: first.state()[key] + second.state()[key] for key in whole.state()})
    for other in (resumed, combined):
        for key, value in whole.state().items():
            scale = float(value.abs().max())
            torch.testing.assert_close(other.state()[key], value, rtol=1e-5, atol=1e-6 * scale)
        assert int(other.state()["subspace_tokens"]) == 900
        ours, theirs = other.dominant().basis, whole.dominant().basis
        assert ours.shape == theirs.shape
        assert largest_angle(ours, theirs) < 1e-3


def test_float32_sums_of_a_thousand_batches_lose_less_than_the_sketch_does() -> None:
    """Why the sketch is no float64: its own approximation is far coarser than its rounding."""
    x = activations(16000, width=64)
    omega = sketch_matrix(64, 24, 42, CPU)
    assert omega is not None
    observer = observed(x, batch=16, rank=24, energy=1.0)
    wide = x.double().T @ (x.double() @ omega.double())
    relative = (observer.sums["sketch"] - wide).norm() / wide.norm()
    assert relative < 3e-6
    rounded = observer.dominant()
    sharp = dominant_subspace(
        wide, omega, float(x.double().square().sum()), x.shape[0], energy=1.0, most=12
    )
    moment, values, _ = exact(x)
    for k in (2, 6):
        by_rounding = captured(moment, sharp.basis[:, :k]) - captured(moment, rounded.basis[:, :k])
        by_sketch = float(values[:k].sum()) - captured(moment, sharp.basis[:, :k])
        assert abs(by_rounding) < 0.01 * by_sketch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    x = activations(500).to(dtype)
    before = x.clone()
    half, full = observed(x, rank=40), observed(x.float(), rank=40)
    assert torch.equal(x, before)
    for key, value in full.state().items():
        assert torch.equal(half.state()[key], value)


@pytest.mark.parametrize("rank", [4, 9, 16])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 40])
def test_few_or_empty_or_zero_inputs(rank: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 20, generator=generator)
    observer = Subspace(rank=rank, energy=1.0).observer(20, CPU)
    observer.update(x)
    observer.update(torch.zeros(2, 20))
    found = observer.dominant()
    assert found.basis.shape[1] <= min(tokens, 20) if tokens else found.basis.shape[1] == 0
    assert torch.isfinite(found.basis).all()
    columns = found.basis.shape[1]
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(columns).double())
    if 0 < tokens <= stored_directions(20, rank):
        assert found.reached
        assert columns == tokens
        assert found.energy == pytest.approx(1, abs=1e-5)


def test_omega_is_fixed_by_width_rank_and_seed() -> None:
    omega = sketch_matrix(100, 20, 1, CPU)
    assert omega is not None
    assert omega.shape == (100, 20)
    assert omega.dtype == torch.float32
    sketch_matrix.cache_clear()
    again = sketch_matrix(100, 20, 1, CPU)
    assert again is not None
    assert torch.equal(omega, again)
    for other in ((100, 20, 2), (100, 21, 1), (101, 20, 1)):
        different = sketch_matrix(*other, CPU)
        assert different is not None
        assert not torch.equal(omega[:, :20], different[:100, :20])
    assert sketch_matrix(100, 50, 1, CPU) is None


def test_default_ranks() -> None:
    widths = (16, 64, 576, 1536, 11008)
    assert [default_rank(width) for width in widths] == [16, 64, 576, 768, 768]
    stored = [stored_directions(width, default_rank(width)) for width in widths]
    assert stored == [16, 64, 144, 192, 192]
    assert stored_directions(11008, 40) == 10


def test_checksum_shows_non_finite_inputs() -> None:
    observer = Subspace(rank=4).observer(20, CPU)
    observer.update(torch.ones(3, 20))
    assert torch.isfinite(observer.checksum())
    for bad in (float("nan"), float("inf")):
        spoiled = Subspace(rank=4).observer(20, CPU)
        x = torch.ones(3, 20)
        x[1, 5] = bad
        spoiled.update(x)
        assert not torch.isfinite(spoiled.checksum())


def test_a_stored_basis_is_orthonormal_again_and_keeps_its_leading_spans() -> None:
    observer = observed(activations(3000), rank=150)
    found, stored = observer.dominant(), observer.finish()["basis"]
    assert stored.dtype == torch.bfloat16
    loaded = orthonormal(stored)
    k = loaded.shape[1]
    assert loaded.dtype == torch.float32
    wide = loaded.double()
    assert (stored.double().T @ stored.double() - torch.eye(k)).abs().max() > 1e-4
    assert (wide.T @ wide - torch.eye(k)).abs().max() < 3e-7
    # bfloat16 keeps 8 bits: the span turns by a few thousandths of a radian.
    assert largest_angle(found.basis, wide) < 5e-3
    for columns in (1, 5, k):
        given = torch.linalg.qr(stored[:, :columns].double())[0]
        assert largest_angle(given, wide[:, :columns]) < 1e-6
        assert torch.equal(orthonormal(stored[:, :columns]), loaded[:, :columns]) or (
            (orthonormal(stored[:, :columns]) - loaded[:, :columns]).abs().max() < 1e-6
        )


def test_an_empty_basis_loads() -> None:
    assert orthonormal(torch.zeros(12, 0, dtype=torch.bfloat16)).shape == (12, 0)


@pytest.mark.parametrize("damage", ["nan", "scaled", "repeated"])
def test_a_damaged_basis_is_refused(damage: str) -> None:
    basis = torch.eye(12)[:, :4].clone()
    if damage == "nan":
        basis[3, 2] = float("nan")
    elif damage == "scaled":
        basis *= 1.5
    else:
        basis[:, 3] = basis[:, 0]
    with pytest.raises(InputError, match="stats, layer 3: the stored basis is damaged"):
        orthonormal(basis.bfloat16(), "stats, layer 3")


def test_less_energy_takes_fewer_columns() -> None:
    eigenvalues = torch.tensor([5.0, 3.0, 1.0, 0.7])
    for energy, columns in ((0.4, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (0.97, 4)):
        found = columns_for_energy(eigenvalues, 10.0, energy, measured=0.97, where="site")
        assert found == columns


def test_more_energy_than_stored_is_refused() -> None:
    eigenvalues = torch.tensor([5.0, 3.0, 1.0, 0.7])
    with pytest.raises(InputError, match=r"stats, layer 3: energy 0\.99 .* 0\.9700 stored"):
        columns_for_energy(eigenvalues, 10.0, 0.99, measured=0.97, where="stats, layer 3")


@pytest.mark.parametrize(("trace", "last"), [(float("nan"), 1.0), (10.0, float("inf"))])
def test_energies_that_are_not_finite_are_refused(trace: float, last: float) -> None:
    with pytest.raises(InputError, match=r"layer 3: .* not finite"):
        columns_for_energy(
            torch.tensor([5.0, last]), trace, 0.5, measured=0.97, where="stats, layer 3"
        )


def test_a_rank_bound_measurement_gives_what_it_has() -> None:
    """It was said when measuring; asking for more than was measured is still refused."""
    eigenvalues = torch.tensor([5.0, 3.0])
    assert columns_for_energy(eigenvalues, 10.0, 0.97, measured=0.97, where="site") == 2
    with pytest.raises(InputError, match=r"0\.8000 stored"):
        columns_for_energy(eigenvalues, 10.0, 0.98, measured=0.97, where="site")


def test_the_measured_energy_can_be_asked_for_after_rounding() -> None:
    for seed in range(20):
        stored = observed(activations(400, width=40, seed=seed), rank=20, energy=0.9).finish()
        columns = columns_for_energy(
            stored["eigenvalues"], float(stored["trace"]), 0.9, measured=0.9, where="site"
        )
        assert columns == stored["basis"].shape[1]


def test_a_kept_sketch_is_stored_beside_the_basis() -> None:
    kept = observed(activations(300), rank=40, keep_sketch=True)
    stored = kept.finish()
    plain = observed(activations(300), rank=40).finish()
    assert set(plain) == {"basis", "eigenvalues", "trace", "subspace_tokens"}
    assert set(stored) == set(plain) | set(kept.state())
    twice = Subspace(rank=40).observer(WIDTH, CPU)
    twice.load_state({key: 2 * stored[key] for key in kept.state()})
    assert largest_angle(twice.dominant().basis, kept.dominant().basis) < 1e-6
    torch.testing.assert_close(twice.finish()["eigenvalues"], stored["eigenvalues"])


def test_a_site_that_saw_only_zeros_has_no_columns() -> None:
    stored = observed(torch.zeros(5, 30), rank=4).finish()
    assert stored["basis"].shape == (30, 0)
    assert columns_for_energy(stored["eigenvalues"], 0.0, 0.97, measured=0.97, where="s") == 0
