"""AIM's kernel: the exact cases and a reference in plain loops."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from mergekit_arm.methods.aim import relax

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(
    SHAPES,
    st.floats(0, 1),
    st.integers(0, 1),
    st.floats(1e-12, 1e12),
    st.integers(0, 2**31),
)
def test_against_loops(
    shape: tuple[int, int], omega: float, axis: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, merged = (torch.randn(shape, generator=generator) for _ in range(2))
    importance = torch.rand(shape[axis], generator=generator) * scale
    found = relax(base, merged, importance, omega, axis)
    peak = max(float(value) for value in importance)
    for row in range(shape[0]):
        for column in range(shape[1]):
            part = float(importance[(row, column)[axis]]) / peak if peak else 0.0
            start, end = float(base[row, column]), float(merged[row, column])
            wanted = start + (end - start) * (1 - (1 - omega) * part)
            assert abs(float(found[row, column]) - wanted) <= 1e-6 * (abs(start) + abs(end) + 1e-9)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 2**31))
def test_exact_cases(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(5, 7, generator=generator).to(dtype)
    merged = torch.randn(5, 7, generator=generator).to(dtype)
    importance = torch.rand(7, generator=generator) + 0.1
    assert torch.equal(relax(base, merged, importance, 1.0, 1), merged)
    frozen = relax(base, merged, importance, 0.0, 1)
    top = int(importance.argmax())
    assert torch.equal(frozen[:, top], base[:, top])
    assert torch.equal(relax(base, base, importance, 0.3, 1), base)
    assert torch.equal(relax(base, merged, torch.zeros(7), 0.0, 1), merged)
    assert frozen.dtype == dtype


def test_rows_of_experts_have_maxima_of_their_own() -> None:
    torch.manual_seed(0)
    base, merged, importance = torch.randn(3, 4, 6), torch.randn(3, 4, 6), torch.rand(3, 6)
    importance[1] = 0
    together = relax(base, merged, importance, 0.1, 2)
    for expert in range(3):
        alone = relax(base[expert], merged[expert], importance[expert], 0.1, 1)
        torch.testing.assert_close(together[expert], alone)
    assert torch.equal(together[1], merged[1])


def test_inputs_are_left_alone_and_narrow_weights_are_chunked() -> None:
    base = torch.randn(3000, 700, dtype=torch.bfloat16)  # more than one chunk
    merged = torch.randn(3000, 700, dtype=torch.bfloat16)
    importance = torch.rand(700)
    before = base.clone(), merged.clone()
    found = relax(base, merged, importance, 0.4, 1)
    assert torch.equal(base, before[0])
    assert torch.equal(merged, before[1])
    whole = relax(base.float(), merged.float(), importance, 0.4, 1).bfloat16()
    assert torch.equal(found, whole)


def test_gradients_flow() -> None:
    base, merged = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    relax(base, merged, torch.rand(5), 0.4, 1).sum().backward()
    torch.testing.assert_close(base.grad + merged.grad, torch.ones(4, 5))
