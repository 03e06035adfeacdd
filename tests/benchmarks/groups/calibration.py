"""A calibration against plain forward passes, and how it grows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import (
    FORWARD,
    LOADED,
    MEMORY,
    PROCESSOR,
    TIME,
    Clock,
    Measured,
    Row,
    Side,
    compare,
    growth,
)
from tests.benchmarks.inputs import Workshop

_SHAPE = "SmolLM2-135M"
_WARM_UP_TOKENS = 16  # as many as a calibration spends on finding the sites


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


def forward(model: str, dataset: str) -> dict[str, float]:
    """Plain ``model(ids)`` over the same batches in the same dtype as a calibration's."""
    import torch
    from transformers import AutoModelForCausalLM

    from mergekit_arm.calibration.running.session import TOKENS_PER_BATCH
    from mergekit_arm.models.loading import choose_dtype

    dtype = choose_dtype("auto", torch.device("cpu"))
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    rows = [json.loads(line)["input_ids"] for line in Path(dataset).read_text().splitlines()]
    size = max(1, TOKENS_PER_BATCH // len(rows[0]))
    with torch.inference_mode():
        loaded(torch.tensor(rows[:1])[:, :_WARM_UP_TOKENS])
        clock = Clock()
        for batch in torch.tensor(rows).split(size):
            loaded(batch)
        took = clock.read()
    return {**took, FORWARD: took[TIME]}


def calibrate(options: dict[str, Any]) -> dict[str, float]:
    """A whole calibration; ``TIME`` is all of it but loading the model.

    Under torchrun, the first process's.
    """
    import datasets  # noqa: F401  # imported late by the calibration
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from mergekit_arm.calibration import prepare
    from mergekit_arm.calibration.calibrate import CalibrationOptions
    from mergekit_arm.calibration.calibrate import calibrate as run

    loading = dict.fromkeys((TIME, PROCESSOR), 0.0)
    load_model = prepare.load_model

    def timed_load(*arguments: Any, **named: Any) -> Any:
        clock = Clock()
        try:
            return load_model(*arguments, **named)
        finally:
            for quantity, seconds in clock.read().items():
                loading[quantity] += seconds

    prepare.load_model = timed_load
    try:
        clock = Clock()
        result = run(CalibrationOptions(**options, device="cpu"))
        took = clock.read()
    finally:
        prepare.load_model = load_model
    if result is None:
        return {}
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options["model"]))
    embedded = sum(p.numel() for p in empty.get_input_embeddings().parameters())
    return {
        **{quantity: seconds - loading[quantity] for quantity, seconds in took.items()},
        LOADED: took[TIME],
        FORWARD: result.seconds,
        # A calibration never multiplies by the embedding table.
        "parameters": sum(p.numel() for p in empty.parameters()) - embedded,
        "tokens": result.metadata.data.tokens,
    }


BENCHMARKS = {
    "calibrate-importance": calibrate_importance,
    "calibrate-all": calibrate_all,
    "calibrate-all-short": calibrate_all_short,
    "calibrate-subspaces": calibrate_subspaces,
    "low-memory": low_memory,
    "processes": processes,
    "growth-tokens": growth_tokens,
    "growth-parameters": growth_parameters,
}
TASKS = (forward, calibrate)
