"""A step of a stream, against its calibration, its merge and its evaluation alone."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import PROCESSOR, TIME, Clock, Measured, Row, Side, compare
from tests.benchmarks.inputs import Workshop

_STEPS = 11


def stream_step(shop: Workshop) -> list[Row]:
    """A step of a tiny model, where nothing hides what a stream does beside the work itself."""
    given = {
        "base": str(shop.model("tiny")),
        "checkpoints": [str(shop.model("tiny", 1 + number % 2)) for number in range(_STEPS)],
        "tokens": str(shop.tokens("tiny", 8, 32)),
    }
    return compare(
        "stream-step",
        Side("a step", lambda: shop.launch("steps", **given)),
        Side("its parts", lambda: shop.launch("parts", **given)),
        {TIME: 1.6, PROCESSOR: 1.6},
        rounds=shop.rounds,
    )


def steps(base: str, checkpoints: list[str], tokens: str) -> Measured:
    """Stream, measuring the model anew at every step; return the cost of one, without the first."""
    from mergekit.options import MergeOptions

    from mergekit_arm.streaming import StreamOptions, stream

    clock, ends = Clock(), list[dict[str, float]]()
    document = {
        "merge_method": "aim",
        "base_model": base,
        "checkpoints": checkpoints,
        "calibration": {"dataset": tokens, "device": "cpu", "refresh": "every"},
        "evaluation": {"dataset": tokens, "device": "cpu", "dtype": "float32"},
        "compare": {"checkpoints": False, "average": False, "angles": False},
        "dtype": "float32",
    }
    with tempfile.TemporaryDirectory() as folder:
        options = StreamOptions(MergeOptions(quiet=True))
        stream(document, Path(folder) / "out", options, on_step=lambda _: ends.append(clock.read()))
    return _of_one(ends)


def parts(base: str, checkpoints: list[str], tokens: str) -> Measured:
    """Calibrate, merge and score as often by hand; return the cost of one, without the first."""
    from mergekit.options import MergeOptions

    from mergekit_arm.calibration.calibrate import calibrate
    from mergekit_arm.calibration.options import CalibrationOptions
    from mergekit_arm.judging.judge import Judge
    from mergekit_arm.judging.sets import HeldOutSet
    from mergekit_arm.merging.documents import to_yaml
    from mergekit_arm.merging.merge import merge

    clock, ends = Clock(), list[dict[str, float]]()
    options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)
    judge = Judge({"loss": HeldOutSet(dataset=tokens)}, [], options, "cpu", "float32")
    with tempfile.TemporaryDirectory() as folder:
        current = base
        for number, checkpoint in enumerate(checkpoints):
            statistics = Path(folder) / f"statistics-{number}"
            calibrate(CalibrationOptions(
                current, str(statistics), dataset=tokens, device="cpu", statistics=("importance",)
            ))  # fmt: skip
            document: dict[str, Any] = {
                "merge_method": "aim",
                "base_model": current,
                "models": [{"model": checkpoint, "parameters": {"weight": 0.5}}],
                "parameters": {"activation_stats": str(statistics)},
                "dtype": "float32",
            }
            current = str(Path(folder) / f"model-{number}")
            merge(document, to_yaml(document), Path(current), options)
            judge.score(current, Path(folder))
            ends.append(clock.read())
    return _of_one(ends)


def _of_one(ends: Sequence[dict[str, float]]) -> Measured:
    first, last = ends[0], ends[-1]
    return {key: (last[key] - first[key]) / (len(ends) - 1) for key in last}


BENCHMARKS = {"stream-step": stream_step}
TASKS = (steps, parts)
