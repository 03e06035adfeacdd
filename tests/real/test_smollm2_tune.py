"""Tune on a real 135 M-parameter Llama: three methods under one budget, judged on real text."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergekit_arm.demo.text import DomainText
from mergekit_arm.tuning import TuneOptions, tune
from mergekit_arm.tuning.trials import TrialRecord
from tests.real.commands import call, merge
from tests.real.smollm2 import LENGTH
from tests.support.merges import weights

pytestmark = [pytest.mark.real, pytest.mark.long]

METHODS = ["task_arithmetic", "aim", "arm"]
SEQUENCES = 2


def write_text(path: Path, text: str) -> str:
    path.write_text(json.dumps({"text": text}) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def document(
    base: Path,
    variants: dict[str, Path],
    corpora: dict[str, DomainText],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tune")
    general = write_text(folder / "general.jsonl", "\n\n".join(corpora["general"].train)[:20_000])
    call(
        "mergekit-arm", "calibrate", base, folder / "stats", "--dataset", general,
        "--dtype", "float32", "--samples", 8, "--sequence-length", LENGTH,
    )  # fmt: skip
    sets: dict[str, dict[str, Any]] = {"evaluation": {}, "test": {}}
    for domain in variants:
        held = "\n\n".join(corpora[domain].heldout)
        half = len(held) // 2
        for which, text in (("evaluation", held[:half]), ("test", held[half:])):
            file = write_text(folder / f"{domain}-{which}.jsonl", text[:20_000])
            data = {"dataset": file, "samples": SEQUENCES, "sequence_length": LENGTH}
            sets[which][domain] = data
    unknown = {"weight": {"tune": [0.1, 1.2]}, "learning_rate": {"tune": [0.1, 1.2]}}
    return {
        "merge_method": {"tune": METHODS},
        "base_model": str(base),
        "models": [{"model": str(one), "parameters": unknown} for one in variants.values()],
        "parameters": {
            "activation_stats": str(folder / "stats"),
            "omega": {"tune": [0.0, 1.0]},
            "rotation": {"tune": [-1.0, 1.0]},
        },
        "dtype": "bfloat16",
        "tuning": {**sets, "trials": 4, "dtype": "float32", "seed": 5, "pruning": False},
    }


def test_three_methods_are_tuned(
    document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    ends: list[float] = []
    said: list[str] = []

    def ended(trial: TrialRecord, best: TrialRecord | None, done: int, budget: int) -> None:
        ends.append(time.perf_counter())
        said.append(f"{trial.study} {trial.describe()} {trial.gain:+.3f} {trial.seconds}")

    result = tune(document, out, TuneOptions(), on_trial=ended)
    trials = [one for one in result.trials if one.study == "tune"]
    assert [one.method for one in trials[:3]] == METHODS
    assert {one.outcome for one in result.trials} == {"complete"}
    assert result.best.gain is not None
    assert result.best.gain > 0
    assert result.best.gain == max(one.gain for one in trials if one.gain is not None)
    assert [label for label, _, _ in result.test] == [label for label, _, _ in result.evaluation]
    assert result.survives is not None
    # Between the ends of two trials lies one trial; what is not merge or score is overhead.
    worked = [one.seconds["merge"] + one.seconds["score"] for one in trials[1:]]
    overhead = (ends[-1] - ends[-len(trials)]) / sum(worked) - 1
    said.append(f"survives {result.survives:.2f}; overhead of a trial {overhead:.1%}")
    said += [f"{label} {gain} {scores}" for label, gain, scores in result.evaluation + result.test]
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(said) + "\n")
    assert overhead < 0.25  # 0.1 is aimed at; a busy machine writes slowly
    best = yaml.safe_load((out / "best.yml").read_text())
    merge(best, tmp_path / "by hand")
    ours, theirs = weights(out / "model"), weights(tmp_path / "by hand")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
