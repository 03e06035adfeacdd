"""The leading eigenvectors of second moments against all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.benchmarks.harness import MEMORY, PROCESSOR, TIME, Clock, Measured, Row, Side, compare
from tests.benchmarks.inputs import Workshop


def eigenvectors(shop: Workshop) -> list[Row]:
    """The directions that a site stores at most against a decomposition that gives all.

    The widths of SmolLM2-135M (whole second moments), and of Llamas of 7 and 70 B (sketches).
    """
    widths = (40, 900) if shop.quick else (576, 1536, 4096, 8192, 28672)
    found = []
    for width in widths:

        def run(way: str, width: int = width) -> Measured:
            rank = 16 if shop.quick else None
            return shop.launch("decompose", way=way, width=width, rank=rank, threads=1)

        found += compare(
            f"eigenvectors {width}",
            Side("leading", lambda run=run: run("leading")),
            Side("all", lambda run=run: run("full")),
            {TIME: None, PROCESSOR: None, MEMORY: None},
            rounds=shop.rounds,
        )
    return found


def decompose(way: str, width: int, rank: int | None) -> dict[str, float]:
    """A site's directions at most: ``leading`` ones only, or all of a ``full`` decomposition.

    ``rank`` None is the default one of ``width``. Eigenvalues fall as 1/i, but for one massive
    direction.
    """
    import torch

    from mergekit_arm.statistics.kinds.eigen import leading_eigenpairs
    from mergekit_arm.statistics.kinds.second_moment import (
        default_rank,
        sketch_matrix,
        stored_directions,
    )

    rank = default_rank(width) if rank is None else rank
    device = torch.device("cpu")
    mirror = torch.randn(width, 1, generator=torch.Generator().manual_seed(0)).double()
    mirror /= mirror.norm()
    eigenvalues = 1 / torch.arange(1, width + 1).double()
    eigenvalues[0] *= 100

    def second_moment_times(matrix: torch.Tensor) -> torch.Tensor:
        turned = eigenvalues[:, None] * (matrix - 2 * mirror @ (mirror.T @ matrix))
        return (turned - 2 * mirror @ (mirror.T @ turned)).float()

    omega = sketch_matrix(width, rank, 42, device)
    drawn = torch.eye(width) if omega is None else omega
    sketch = second_moment_times(drawn.double())
    most = stored_directions(width, rank)

    def full() -> Any:
        y = sketch.double()
        if omega is None:
            return torch.linalg.eigh(y, UPLO="U")
        core = omega.double().T @ y
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        sound = values > 1e-6 * float(values[-1])
        half = y @ (vectors[:, sound] / values[sound].sqrt())
        return torch.linalg.svd(half, full_matrices=False)

    run: Callable[[], Any] = {
        "leading": lambda: leading_eigenpairs(sketch, omega, most),
        "full": full,
    }[way]
    torch.linalg.eigh(torch.eye(16))  # the libraries' own start-up
    clock = Clock()
    run()
    return clock.read()


BENCHMARKS = {"eigenvectors": eigenvectors}
TASKS = (decompose,)
