"""A trial of a search, against one merge to the disk and one scoring of its model."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import TIME, Measured, Row, Side, compare
from tests.benchmarks.inputs import Workshop

_SHAPE = "SmolLM2-135M"
_TRIALS = 6


def tune_trial(shop: Workshop) -> list[Row]:
    """A trial of two models by task arithmetic: all of it, from one trial's end to the next's."""
    shape = shop.shape(_SHAPE)
    tokens = shop.tokens(shape, 8, 32) if shop.quick else shop.tokens(shape, 16, 512)
    document = {
        "merge_method": "task_arithmetic",
        "base_model": str(shop.model(shape)),
        "models": [{"model": str(shop.model(shape, 1 + i))} for i in range(2)],
        "dtype": "bfloat16",
    }
    given = {"document": document, "tokens": str(tokens)}
    return compare(
        "tune-trial",
        Side("a trial", lambda: shop.launch("trials", **given)),
        Side("merge and score", lambda: shop.launch("merges_and_scores", **given)),
        {TIME: 1.10},
        rounds=shop.rounds,
    )


def trials(document: dict[str, Any], tokens: str) -> Measured:
    """Search a grid, and return the seconds of one trial; the first is left out."""
    from mergekit_arm.tuning import TuneOptions, tune

    ends: list[float] = []
    config = {
        **document,
        "parameters": {"weight": {"tune": [0.1, 1.1]}},
        "tuning": {
            "evaluation": {"tokens": {"dataset": tokens}},
            "trials": _TRIALS,
            "sampler": "grid",
            "baseline": False,
            "pruning": False,
            "dtype": "float32",
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        tune(
            config,
            Path(folder) / "out",
            TuneOptions(model=False),
            on_trial=lambda *_: ends.append(time.perf_counter()),
        )
    return {TIME: (ends[-1] - ends[0]) / (len(ends) - 1)}


def merges_and_scores(document: dict[str, Any], tokens: str) -> Measured:
    """Merge to the disk, load and score as often, and return the seconds of one; not the first."""
    from mergekit.options import MergeOptions

    from mergekit_arm.judging.judge import Judge
    from mergekit_arm.judging.sets import HeldOutSet
    from mergekit_arm.merging.documents import to_yaml
    from mergekit_arm.merging.merge import merge

    ends: list[float] = []
    options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)
    judge = Judge(
        {"tokens": HeldOutSet(dataset=tokens)}, [], options, device="cpu", dtype="float32"
    )
    with tempfile.TemporaryDirectory() as folder:
        for trial in range(_TRIALS):
            filled = {**document, "parameters": {"weight": 0.1 + trial / (_TRIALS - 1)}}
            model = Path(folder) / "merged"
            merge(filled, to_yaml(filled), model, options)
            judge.score(str(model), Path(folder))
            ends.append(time.perf_counter())
    return {TIME: (ends[-1] - ends[0]) / (len(ends) - 1)}


BENCHMARKS = {"tune-trial": tune_trial}
TASKS = (trials, merges_and_scores)
