"""Probes recognise a weight through changes of dtype, and nothing else."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from mergekit_arm.statistics.probe import PROBE_SIZE, probe_matches, probe_positions, take_probe

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@given(st.integers(1, 2**40))
def test_positions_lie_inside(numel: int) -> None:
    positions = probe_positions(numel)
    assert positions.shape == (PROBE_SIZE,)
    assert int(positions.min()) >= 0
    assert int(positions.max()) < numel


def test_positions_spread_over_rows_and_columns() -> None:
    for rows, columns in ((576, 576), (4096, 11008), (49152, 576), (128, 4096)):
        positions = probe_positions(rows * columns)
        assert len(set((positions // columns).tolist())) > PROBE_SIZE // 2
        assert len(set((positions % columns).tolist())) > PROBE_SIZE // 2


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from([*DTYPES, torch.float64]), st.integers(0, 2**31))
def test_a_cast_is_recognised(stored: torch.dtype, used: torch.dtype, seed: int) -> None:
    weight = torch.randn(13, 21, generator=torch.Generator().manual_seed(seed)).to(stored)
    probe = take_probe(weight)
    assert probe_matches(probe, weight.to(used))
    assert probe_matches(probe, weight.to(torch.bfloat16).to(used))  # by way of a narrower one


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_weight_is_not(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64).to(dtype)
    probe = take_probe(weight)
    assert not probe_matches(probe, weight.roll(1))
    assert not probe_matches(probe, (weight.float() * 1.02).to(dtype))


def test_strided_tensors_are_read_in_their_logical_order() -> None:
    weight = torch.randn(6, 10)
    assert torch.equal(take_probe(weight.t().contiguous().t()), take_probe(weight))
