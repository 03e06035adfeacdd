"""A long stream needs no more memory, files or disk at its end than near its beginning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_arm.streaming import stream
from tests.support.memory import memory_held
from tests.support.models import perturbed
from tests.support.streams import config, write_tokens

REFERENCE = 5
"""The step from which on nothing may grow."""


def weights_on_disk(out: Path) -> int:
    """Return the bytes of all tensors in ``out``, whatever they are."""
    return sum(path.stat().st_size for path in out.rglob("*.safetensors"))


def follow(document: dict[str, Any], out: Path) -> list[dict[str, int]]:
    """Run a stream; return what it holds after every step."""
    process = psutil.Process()
    held: list[dict[str, int]] = []

    def look(_: Any) -> None:
        held.append(
            {
                "memory": memory_held(),
                "files": process.num_fds(),
                "maps": len(process.memory_maps()),
                "disk": weights_on_disk(out),
                "entries": sum(len(names) for _, _, names in os.walk(out)),
            }
        )

    stream(document, out, on_step=look)
    return held


def follow_apart(document: dict[str, Any], out: Path) -> list[dict[str, int]]:
    """Do as ``follow`` does in a process of its own.

    What other tests have left behind in this one would hide growth, or look like it.
    """
    script = (
        "import json, sys; from pathlib import Path; "
        "from tests.streaming.test_growth import follow;"
        "print(json.dumps(follow(json.loads(sys.argv[1]), Path(sys.argv[2]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(document), str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    held: list[dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return held


def assert_no_growth(held: list[dict[str, int]], model: int) -> None:
    """Check that what a stream holds grows by less than half a ``model`` (bytes) in all."""
    first, rest = held[REFERENCE - 1], held[REFERENCE:]
    assert max(one["files"] for one in rest) <= first["files"]
    # Statistics of a later model may need a few directions more.
    assert max(one["disk"] for one in rest) <= 1.01 * first["disk"]
    # The journal's own records, and not one model: two megabytes were measured for seven steps.
    steps = len(rest)
    assert held[-1]["memory"] - first["memory"] < model // 2
    assert held[-1]["maps"] - first["maps"] < steps // 2
    assert held[-1]["entries"] - first["entries"] <= 3 * steps


def write_wide_run(folder: Path) -> None:
    """Save a base and two checkpoints of 10 MB: keeping one would show above the allocator's noise.

    Most of it is embeddings, so that a step of them is still quick.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=39_000,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder / "base")
    for number in (1, 2):
        perturbed(model, number).save_pretrained(folder / "run" / f"checkpoint-{number}")
    write_tokens(folder / "tokens.jsonl", 1, rows=4)


@pytest.mark.slow
def test_twelve_steps_grow_nothing(tmp_path: Path) -> None:
    write_wide_run(tmp_path)
    document = config(
        tmp_path,
        merge_method="arm",
        passes=6,
        calibration={"dataset": str(tmp_path / "tokens.jsonl"), "refresh": 6},
        evaluation={
            "dataset": str(write_tokens(tmp_path / "heldout.jsonl", 3, rows=2)),
            "keep": "last",  # the best step's weights would come to the last one's, once
        },
    )
    held = follow_apart(document, tmp_path / "out")
    assert len(held) == 12
    assert_no_growth(held, model=(tmp_path / "base" / "model.safetensors").stat().st_size)


def as_large_as_smollm2(folder: Path) -> None:
    """Save a base and two checkpoints with SmolLM2-135M's shapes and random weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    ).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    for number in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.002)
        model.save_pretrained(folder / "run" / f"checkpoint-{number}")
    write_tokens(folder / "tokens.jsonl", 1, rows=8, length=128)
    write_tokens(folder / "heldout.jsonl", 2, rows=4, length=128)


@pytest.mark.long
def test_fifty_steps_with_135_million_parameters_grow_nothing(tmp_path: Path) -> None:
    as_large_as_smollm2(tmp_path)
    document = config(
        tmp_path,
        merge_method="arm",
        passes=25,
        calibration={"dataset": str(tmp_path / "tokens.jsonl"), "refresh": 10},
        evaluation={"dataset": str(tmp_path / "heldout.jsonl"), "keep": "last"},
        dtype="bfloat16",
    )
    held = follow_apart(document, tmp_path / "out")
    assert len(held) == 50
    model = 4 * 134_515_008
    first = held[REFERENCE - 1]
    assert max(one["memory"] for one in held[REFERENCE:]) - first["memory"] < model // 8
    assert_no_growth(held, model)
