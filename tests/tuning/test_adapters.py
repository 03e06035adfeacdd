"""Inputs that are adapters: merged into their base once, and gone at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_arm.cli.main import cli
from mergekit_arm.tuning import tune
from tests.streaming.test_adapters import by_hand, write_adapters
from tests.support.models import tiny_llama
from tests.support.streams import weights, write_tokens


def test_adapters_are_tuned(tmp_path: Path) -> None:
    write_adapters(tmp_path, tiny_llama(0))
    base = str(tmp_path / "base")
    document = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": f"{base}+{tmp_path}/run/checkpoint-3"}],
        "parameters": {"weight": {"tune": [0.0, 0.5]}},
        "dtype": "float32",
        "tuning": {
            "evaluation": {"x": {"dataset": str(write_tokens(tmp_path / "x.jsonl", 3))}},
            "trials": 3,
            "sampler": "grid",
            "baseline": False,
            "pruning": False,
            "dtype": "float32",
        },
    }
    file, out = tmp_path / "tune.yml", tmp_path / "out"
    file.write_text(json.dumps(document))  # which is YAML too
    dry = CliRunner().invoke(cli, ["tune", str(file), str(out), "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert not out.exists()
    result = tune(file, out)
    assert not (out / ".adapters").exists()
    weight = result.best.values["weight"]
    assert isinstance(weight, float)
    whole, merged = by_hand(tmp_path, 3), weights(out / "model")
    for name, start in weights(tmp_path / "base").items():
        expected = start + weight * (whole[name] - start)
        assert float((merged[name] - expected).abs().max()) == pytest.approx(0, abs=1e-5)
