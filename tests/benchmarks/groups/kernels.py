"""One step on one weight against the products it cannot do without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from tests.benchmarks.harness import (
    EXTRA,
    PROCESSOR,
    TIME,
    Clock,
    Measured,
    Row,
    Side,
    compare,
    peak_bytes,
)
from tests.benchmarks.inputs import Workshop


def kernel(shop: Workshop) -> list[Row]:
    """One ARM step on one weight against the two products it cannot do without."""
    rows, width, rank = (64, 96, 8) if shop.quick else (4096, 11008, 256)
    found = []
    for dtype, size in (("float32", 4),) if shop.quick else (("float32", 4), ("bfloat16", 2)):
        label = f"kernel {dtype}"

        def run(what: str, dtype: str = dtype) -> Measured:
            return shop.launch(
                "measure_kernel", what=what, rows=rows, width=width, rank=rank, dtype=dtype
            )

        found += compare(
            label,
            Side("arm_step", lambda run=run: run("step")),
            Side("(τ U) Uᵀ", lambda run=run: run("pair")),
            {TIME: 3.0},
            rounds=shop.rounds,
        )
        found += compare(
            label,
            Side("arm_step", lambda run=run: run("step")),
            Side("the weight", lambda size=size: {EXTRA: float(rows * width * size)}),
            {EXTRA: 2.0},
            rounds=shop.rounds,
        )
    return found


def measure_kernel(what: str, rows: int, width: int, rank: int, dtype: str) -> dict[str, float]:
    """One ARM step on a weight, or one pair of products of its task vector with the basis.

    The products are of float32, as the step's are: ``dtype`` is that of the weights.
    """
    import torch

    from mergekit_arm.methods.step import Incoming, arm_step

    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    weight, checkpoint = (
        torch.empty(rows, width, dtype=kind).normal_(generator=generator) for _ in range(2)
    )
    basis = torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q
    task = checkpoint.float() - weight.float() if what == "pair" else weight
    runs: dict[str, Callable[[slice], Any]] = {
        "step": lambda part: arm_step(
            weight[part], [Incoming(checkpoint[part], 0.5)], basis, rotation=-0.4
        ),
        "pair": lambda part: (task[part] @ basis) @ basis.T,
    }
    run = runs[what]
    run(slice(16))  # the libraries' own start-up
    before = peak_bytes()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        run(slice(None))
        seconds.append(time.perf_counter() - started)
    return {TIME: statistics.median(seconds), EXTRA: float(peak_bytes() - before)}


def regmean_kernel(shop: Workshop) -> list[Row]:
    """RegMean of two models on one weight against the products it cannot do without."""
    rows, width, rank = (64, 96, 8) if shop.quick else (4096, 11008, 256)
    found = []
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        label = f"regmean-kernel {dtype}"

        def run(what: str, dtype: str = dtype) -> Measured:
            return shop.launch(
                "measure_regmean_kernel", what=what, rows=rows, width=width, rank=rank, dtype=dtype
            )

        for what in ("step", "prepare"):
            found += compare(
                label,
                Side(what, lambda run=run, what=what: run(what)),
                Side("products with U", lambda run=run: run("products")),
                {TIME: None, PROCESSOR: None},
                rounds=shop.rounds,
            )
        found += compare(
            label,
            Side("step", lambda run=run: run("step")),
            Side("the weight", lambda size=size: {EXTRA: float(rows * width * size)}),
            {EXTRA: 2.0},
            rounds=shop.rounds,
        )
    return found


def measure_regmean_kernel(
    what: str, rows: int, width: int, rank: int, dtype: str
) -> dict[str, float]:
    """RegMean of two models on a weight, or the products of its task vectors that it must make.

    ``what`` is ``step`` (the rows, their least squares ready), ``prepare`` (those, once for all
    weights of a site) or ``products``. The products are of float32, as the step's are.
    """
    import torch

    from mergekit_arm.methods.moments import least_squares, second_moment
    from mergekit_arm.methods.regression import regression_step

    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    weight, *models = (
        torch.empty(rows, width, dtype=kind).normal_(generator=generator) for _ in range(3)
    )
    values = torch.linspace(100, 1, rank)
    bases = [torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q for _ in models]
    moments = [second_moment(1 + one.square() @ values, one, values) for one in bases]
    solution = least_squares(moments, [1.0, 1.0])
    tasks = [one.float() - weight.float() for one in models] if what == "products" else models
    back = solution.back
    assert back is not None
    runs: dict[str, Callable[[slice], Any]] = {
        "step": lambda part: regression_step(weight[part], [m[part] for m in models], solution),
        "prepare": lambda part: least_squares(moments, [1.0, 1.0]),
        "products": lambda part: (
            torch.cat([t[part] @ one for t, one in zip(tasks, bases, strict=True)], 1) @ back
        ),
    }
    run = runs[what]
    run(slice(16))  # the libraries' own start-up
    before = peak_bytes()
    took = []
    for _ in range(5):
        clock = Clock()
        run(slice(None))
        took.append(clock.read())
    middle = {key: statistics.median(one[key] for one in took) for key in took[0]}
    return {**middle, EXTRA: float(peak_bytes() - before)}


BENCHMARKS = {"kernel": kernel, "regmean-kernel": regmean_kernel}
TASKS = (measure_kernel, measure_regmean_kernel)
