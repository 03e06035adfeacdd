"""The sums: exact enough at any length, and they add up."""

from __future__ import annotations

import torch

from mergekit_arm.statistics.kinds.importance import IMPORTANCE

CPU = torch.device("cpu")


def test_sums_against_float64() -> None:
    torch.manual_seed(0)
    x = torch.randn(3000, 17) * torch.logspace(-6, 6, 17)
    observer = IMPORTANCE.observer(17, CPU)
    for rows in x.split(700):
        observer.update(rows)
    state = observer.state()
    torch.testing.assert_close(state["abs_sum"], x.double().abs().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(state["square_sum"], x.double().square().sum(0), rtol=1e-6, atol=0)


def test_float32_running_sums_lose_digits_and_ours_do_not() -> None:
    """At 10⁷ tokens, added batch by batch as a calibration does."""
    batch = torch.full((4096, 1), 0.1) + torch.linspace(0, 1e-3, 4096)[:, None]
    batches = 10_000_000 // 4096
    exact = batch.double().sum() * batches
    observer = IMPORTANCE.observer(1, CPU)
    naive = torch.zeros(1)
    for _ in range(batches):
        observer.update(batch)
        naive += batch.abs().sum(0)
    ours = abs(float(observer.sums["abs_sum"]) / float(exact) - 1)
    theirs = abs(float(naive) / float(exact) - 1)
    assert ours < 1e-6
    assert theirs > 10 * ours


def test_states_add_up() -> None:
    torch.manual_seed(1)
    x = torch.randn(64, 5)
    whole, first, second, resumed = (IMPORTANCE.observer(5, CPU) for _ in range(4))
    whole.update(x)
    first.update(x[:20])
    second.update(x[20:])
    resumed.load_state(first.state())
    resumed.update(x[20:])
    close = {"rtol": 1e-6, "atol": 0.0}
    for key, value in whole.state().items():
        # Batches of other sizes are summed in float32 in another order.
        torch.testing.assert_close(first.state()[key] + second.state()[key], value, **close)
        torch.testing.assert_close(resumed.state()[key], value, **close)


def test_the_input_is_left_alone_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(8, 3).to(dtype)
        before = x.clone()
        observer = IMPORTANCE.observer(3, CPU)
        observer.update(x)
        assert torch.equal(x, before)
        torch.testing.assert_close(
            observer.sums["abs_sum"], x.double().abs().sum(0), rtol=1e-6, atol=0
        )


def test_checksum_shows_what_is_not_finite() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        observer = IMPORTANCE.observer(3, CPU)
        observer.update(torch.tensor([[1.0, bad, 2.0]]))
        assert not torch.isfinite(observer.checksum())
