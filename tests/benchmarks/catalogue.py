"""Every benchmark, by name, and the target of each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median
from typing import Any

from mergekit_arm.statistics.kinds.second_moment import default_rank
from tests.benchmarks.authors import authors_script
from tests.benchmarks.harness import (
    MEMORY,
    PROCESSOR,
    TIME,
    WALL,
    Measured,
    Row,
    Side,
    compare,
    growth,
    start,
)
from tests.benchmarks.inputs import REAL, Workshop
from tests.benchmarks.worker import EXTRA, FORWARD, LOADED

_SHAPE = "SmolLM2-135M"


def calibrate_importance(shop: Workshop) -> list[Row]:
    """Calibration without subspaces against ``model(ids)`` over the same tokens."""
    return _against_forward(shop, "calibrate-importance", 0.95, statistics=["importance"])


def calibrate_all(shop: Workshop) -> list[Row]:
    """Calibration at its defaults, subspaces included, against ``model(ids)``.

    At the default number of tokens, since subspaces are measured on a sample of fixed size.
    """
    return _against_forward(shop, "calibrate-all", 1.15, sequences=256)


def calibrate_all_short(shop: Workshop) -> list[Row]:
    """The same on so few tokens that every one of them is in the sample."""
    return _against_forward(shop, "calibrate-all-short", None)


def calibrate_subspaces(shop: Workshop) -> list[Row]:
    """Calibration with subspaces against calibration without."""
    shape = shop.shape(_SHAPE)
    tokens = shop.tokens(shape, 4, 32) if shop.quick else shop.tokens(shape, 256, 512)
    return compare(
        "calibrate-subspaces",
        Side("with subspaces", lambda: shop.calibrate(shape, tokens)),
        Side("without", lambda: shop.calibrate(shape, tokens, statistics=["importance"])),
        {TIME: None, FORWARD: None, PROCESSOR: None, MEMORY: None},
        rounds=min(shop.rounds, 3),
    )


def _against_forward(
    shop: Workshop, name: str, at_most: float | None, sequences: int = 32, **options: Any
) -> list[Row]:
    shape = shop.shape(_SHAPE)
    tokens = shop.tokens(shape, 4, 32) if shop.quick else shop.tokens(shape, sequences, 512)
    model = shop.model(shape)
    return compare(
        name,
        Side("calibrate", lambda: shop.calibrate(shape, tokens, **options)),
        Side("forward", lambda: shop.launch("forward", model=str(model), dataset=str(tokens))),
        {TIME: at_most, FORWARD: at_most, PROCESSOR: None, MEMORY: None},
        rounds=shop.rounds if sequences < 256 else min(shop.rounds, 3),
    )


def merge_aim_task_arithmetic(shop: Workshop) -> list[Row]:
    """``aim_task_arithmetic`` against mergekit's ``task_arithmetic``."""
    return _merges(shop, "aim_task_arithmetic", "task_arithmetic")


def merge_aim_ties(shop: Workshop) -> list[Row]:
    """``aim_ties`` against mergekit's ``ties``."""
    return _merges(shop, "aim_ties", "ties", {"weight": 0.5, "density": 0.5})


def merge_arm(shop: Workshop) -> list[Row]:
    """One checkpoint by ``arm`` against mergekit's ``task_arithmetic``.

    On the real SmolLM2: how many directions a subspace has decides what a rotation costs, and
    random activations have far more than text's.
    """
    return _merge_arm(shop, "merge-arm", models=1)


def merge_arm_two(shop: Workshop) -> list[Row]:
    """The same with two checkpoints in one step."""
    return _merge_arm(shop, "merge-arm-two", models=2)


def _merge_arm(shop: Workshop, name: str, *, models: int) -> list[Row]:
    return _merges(
        shop,
        "arm",
        "task_arithmetic",
        own={"learning_rate": 0.5},
        models=models,
        base=REAL,
        time=1.5,
        memory=1.25,
        name=name,
    )


def merge_every_aim(shop: Workshop) -> list[Row]:
    """Every ``aim_X`` against mergekit's ``X``. Long; only when asked for."""
    rows = []
    needed = {"nearswap": {"t": 0.01}, "slerp": {"t": 0.4}}
    known = shop.launch("methods")
    # arm is ours: mergekit has nothing to compare
    names = [name for name in known if name not in (WALL, MEMORY, "arm")]
    for name in names[:: len(names) // 2] if shop.quick else names:
        takes = known[name]
        parameters = dict(needed.get(name, {}))
        parameters |= {"weight": 0.5} if takes["needs_weight"] else {}
        with_base = takes["base"] in ("REQUIRED", "OPTIONAL")
        most = takes["non_base"] or (takes["inputs"] and takes["inputs"] - with_base) or 2
        rows += _merges(
            shop, f"aim_{name}", name, parameters, models=min(most, 2), with_base=with_base
        )
    return rows


def _merges(
    shop: Workshop,
    ours: str,
    theirs: str,
    parameters: dict[str, Any] | None = None,
    *,
    own: dict[str, Any] | None = None,
    models: int = 2,
    with_base: bool = True,
    base: str = _SHAPE,
    time: float = 1.10,
    memory: float = 1.15,
    name: str | None = None,
) -> list[Row]:
    shape = shop.shape(base)
    statistics = {"activation_stats": str(shop.statistics(shape))}
    shared = {"weight": 0.5} if parameters is None else parameters

    def merge(method: str, extra: dict[str, Any], with_base: bool) -> Measured:
        config: dict[str, Any] = {
            "merge_method": method,
            "models": [{"model": str(shop.model(shape, 1 + i))} for i in range(models)],
            "parameters": extra,
            "dtype": "bfloat16",
        }
        if with_base:
            config["base_model"] = str(shop.model(shape))
        with shop.scratch() as scratch:
            return shop.launch("merge", config=config, out=str(scratch / "merged"))

    shop.model(shape, 1), shop.model(shape, models)
    return compare(
        name or f"merge-{ours}",
        Side(ours, lambda: merge(ours, {**(own or shared), **statistics}, True)),
        Side(theirs, lambda: merge(theirs, shared, with_base)),
        {TIME: time, WALL: time, PROCESSOR: None, MEMORY: memory},
        rounds=shop.rounds,
        warm_up=not shop.quick,
    )


def low_memory(shop: Workshop) -> list[Row]:
    """``--low-memory`` against a calibration in memory, on a checkpoint of more than 6 GB.

    In bfloat16, so that the in-memory run fits a machine of 16 GB.
    """
    shape = shop.shape("Llama 3.2B")
    tokens = shop.tokens(shape, 4, 32) if shop.quick else shop.tokens(shape, 8, 512)
    size = sum(file.stat().st_size for file in shop.model(shape).glob("*.safetensors"))
    rounds = min(shop.rounds, 3)
    walked: list[Measured] = []

    def walk() -> Measured:
        walked.append(shop.calibrate(shape, tokens, low_memory=True, dtype="bfloat16"))
        return walked[-1]

    found = compare(
        "low-memory",
        Side("layer by layer", walk),
        Side("in memory", lambda: shop.calibrate(shape, tokens, dtype="bfloat16")),
        {LOADED: 1.5, PROCESSOR: None, MEMORY: None},
        rounds=rounds,
    )
    peaks = iter(walked)
    return found + compare(
        "low-memory",
        Side("layer by layer", lambda: next(peaks)),
        Side("the checkpoint", lambda: {MEMORY: float(size)}),
        {MEMORY: max(0.25, 1.5e9 / size)},
        rounds=rounds,
    )


def processes(shop: Workshop) -> list[Row]:
    """Two and four processes of one thread against one process of two threads."""
    shape = shop.shape(_SHAPE)
    tokens = shop.tokens(shape, 4, 32) if shop.quick else shop.tokens(shape, 32, 512)
    found = []
    counts = ((2, 1.1),) if shop.quick else ((2, 1.1), (4, None))
    for count, target in counts:
        found += compare(
            "processes",
            Side(
                f"{count} × 1 thread",
                lambda count=count: shop.calibrate(shape, tokens, processes=count, threads=1),
            ),
            Side("1 × 2 threads", lambda: shop.calibrate(shape, tokens, threads=2)),
            {TIME: target},
            rounds=shop.rounds,
        )
    return found


def growth_tokens(shop: Workshop) -> list[Row]:
    """A calibration's time against the number of tokens."""
    shape = shop.shape(_SHAPE)
    length = 32 if shop.quick else 512

    def one_round() -> list[tuple[str, float, float]]:
        found = []
        for sequences in (8, 16, 32):
            took = shop.calibrate(shape, shop.tokens(shape, sequences, length))
            found.append((f"{took['tokens']:,} tokens", took["tokens"], took[TIME]))
        return found

    return [growth("growth-tokens", TIME, one_round, 1.05, rounds=shop.rounds)]


def growth_parameters(shop: Workshop) -> list[Row]:
    """A calibration's time against the number of parameters that are multiplied with."""
    shapes = ["tiny", "wider", "widest"] if shop.quick else ["Llama 45M", _SHAPE, "SmolLM2-360M"]

    def one_round() -> list[tuple[str, float, float]]:
        found = []
        for shape in shapes:
            tokens = shop.tokens(shape, 4, 32) if shop.quick else shop.tokens(shape, 8, 512)
            took = shop.calibrate(shape, tokens)
            label = f"{took['parameters'] / 1e6:,.1f} M"
            found.append((label, took["parameters"], took[TIME]))
        return found

    return [growth("growth-parameters", TIME, one_round, 1.05, rounds=shop.rounds)]


def start_up(shop: Workshop) -> list[Row]:
    """Two times that have a limit: Python's start with the import hook, and ``--help``."""
    python, rounds = [sys.executable, "-c", "pass"], 1 if shop.quick else 41

    def hook() -> Measured:
        # Pairs and their median, for what else the machine is doing.
        extra = median(
            start(python, MERGEKIT_ARM_AUTOLOAD="1")[PROCESSOR]
            - start(python, MERGEKIT_ARM_AUTOLOAD="0")[PROCESSOR]
            for _ in range(rounds)
        )
        return {PROCESSOR: max(extra, 1e-6)}

    command = [sys.executable, "-m", "mergekit_arm", "--help"]
    found = []
    for label, run, limit in (
        ("the import hook", hook, 0.003),
        ("mergekit-arm --help", lambda: start(command), 0.5),
    ):
        found += compare(
            f"start-up: {label}",
            Side(label, run),
            Side(f"{limit} s", lambda limit=limit: {PROCESSOR: limit}),
            {PROCESSOR: 1.0},
            rounds=shop.rounds,
        )
    return found


def kernel(shop: Workshop) -> list[Row]:
    """One ARM step on one weight against the two products it cannot do without."""
    rows, width, rank = (64, 96, 8) if shop.quick else (4096, 11008, 256)
    found = []
    for dtype, size in (("float32", 4),) if shop.quick else (("float32", 4), ("bfloat16", 2)):
        label = f"kernel {dtype}"

        def run(what: str, dtype: str = dtype) -> Measured:
            return shop.launch("kernel", what=what, rows=rows, width=width, rank=rank, dtype=dtype)

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


def regmean_kernel(shop: Workshop) -> list[Row]:
    """RegMean of two models on one weight against the products it cannot do without."""
    rows, width, rank = (64, 96, 8) if shop.quick else (4096, 11008, 256)
    found = []
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        label = f"regmean-kernel {dtype}"

        def run(what: str, dtype: str = dtype) -> Measured:
            return shop.launch(
                "regmean_kernel", what=what, rows=rows, width=width, rank=rank, dtype=dtype
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


def eigenvectors(shop: Workshop) -> list[Row]:
    """The directions that a site stores at most against a decomposition that gives all.

    The widths of SmolLM2-135M (whole second moments), and of Llamas of 7 and 70 B (sketches).
    """
    widths = (40, 900) if shop.quick else (576, 1536, 4096, 8192, 28672)
    found = []
    for width in widths:

        def run(way: str, width: int = width) -> Measured:
            rank = 16 if shop.quick else default_rank(width)
            return shop.launch("eigenvectors", way=way, width=width, rank=rank, threads=1)

        found += compare(
            f"eigenvectors {width}",
            Side("leading", lambda run=run: run("leading")),
            Side("all", lambda run=run: run("full")),
            {TIME: None, PROCESSOR: None, MEMORY: None},
            rounds=shop.rounds,
        )
    return found


BENCHMARKS: dict[str, Callable[[Workshop], list[Row]]] = {
    "calibrate-importance": calibrate_importance,
    "calibrate-all": calibrate_all,
    "calibrate-all-short": calibrate_all_short,
    "calibrate-subspaces": calibrate_subspaces,
    "merge-aim_task_arithmetic": merge_aim_task_arithmetic,
    "merge-aim_ties": merge_aim_ties,
    "merge-arm": merge_arm,
    "merge-arm-two": merge_arm_two,
    "low-memory": low_memory,
    "processes": processes,
    "growth-tokens": growth_tokens,
    "growth-parameters": growth_parameters,
    "start-up": start_up,
    "kernel": kernel,
    "regmean-kernel": regmean_kernel,
    "eigenvectors": eigenvectors,
    "authors-script": authors_script,
    "merge-every-aim": merge_every_aim,
}
ON_REQUEST = ("merge-every-aim",)
"""Run only when named."""
