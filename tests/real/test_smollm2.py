"""AIM and ARM on a real 135 M-parameter Llama, as small as their promises allow.

One fine-tune, one calibration that serves both, one merge of each. What needs two fine-tunes,
exact subspaces or a search is in the other files here, and is run by ``-m long``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from mergekit_arm.demo.text import DomainText
from mergekit_arm.demo.train import token_blocks
from mergekit_arm.judging.heldout import whole_text
from mergekit_arm.judging.loss import mean_loss
from tests.real.commands import call, merge
from tests.real.formula import assert_relaxed, assert_turned, mean_magnitudes
from tests.real.smollm2 import LENGTH, capital_of_france, fine_tune
from tests.support.merges import weights

pytestmark = pytest.mark.real

STEPS = 6
BLOCKS = 4
RANK = 64
"""Of the sketches: exact subspaces of 1536 channels take seconds each."""
OMEGA = 0.4
RATE = 0.7
ROTATION = -0.4


@pytest.fixture(scope="module")
def tuned(
    base: Path, corpora: dict[str, DomainText], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    fine_tune(base, corpora["prose"].train, folder, STEPS, {STEPS})
    return folder / f"checkpoint-{STEPS}"


@pytest.fixture(scope="module")
def blocks(base: Path, corpora: dict[str, DomainText]) -> Tensor:
    """Calibration tokens: real text, (blocks, length)."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    return token_blocks(tokenizer, corpora["general"].train, LENGTH)[:BLOCKS]


@pytest.fixture(scope="module")
def merges(
    base: Path, tuned: Path, blocks: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Merges by name of method, made by the commands that a user would type."""
    folder = tmp_path_factory.mktemp("merges")
    rows = [json.dumps({"input_ids": block.tolist()}) + "\n" for block in blocks]
    (folder / "tokens.jsonl").write_text("".join(rows))
    call(
        "mergekit-arm", "calibrate", base, folder / "stats", "--rank", RANK,
        "--dataset", folder / "tokens.jsonl", "--dtype", "float32",
    )  # fmt: skip

    def config(method: str, own: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
        return {
            "merge_method": method,
            "base_model": str(base),
            "models": [{"model": str(tuned), "parameters": own}],
            "parameters": {"activation_stats": str(folder / "stats"), **shared},
            "dtype": "float32",
        }

    merge(config("aim", {"weight": RATE}, {"omega": OMEGA}), folder / "aim")
    merge(config("arm", {"learning_rate": RATE}, {"rotation": ROTATION}), folder / "arm")
    return {name: folder / name for name in ("aim", "arm")}


def linear(base: Path, tuned: Path) -> dict[str, Tensor]:
    """Return the merge without activations, computed here."""
    before, after = weights(base), weights(tuned)
    return {
        name: (start.double() + RATE * (after[name].double() - start.double())).float()
        for name, start in before.items()
    }


def test_every_weight_is_aims_formula(
    base: Path, tuned: Path, merges: dict[str, Path], blocks: Tensor
) -> None:
    importance = mean_magnitudes(base, blocks)
    assert_relaxed(base, linear(base, tuned), merges["aim"], OMEGA, importance)


def test_an_arm_step_turns_every_matrix_and_keeps_its_length(
    base: Path, tuned: Path, merges: dict[str, Path]
) -> None:
    straight, turned = linear(base, tuned), weights(merges["arm"])
    assert_turned(weights(base), straight, turned, rtol=1e-5, atol=1e-7)


def test_both_load_speak_and_know_what_was_learnt(
    base: Path, merges: dict[str, Path], corpora: dict[str, DomainText]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    heldout = whole_text(token_blocks(tokenizer, corpora["prose"].heldout, LENGTH)[:4])
    losses = {}
    for name, folder in {"base": base, **merges}.items():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        losses[name] = mean_loss(model, heldout, 2)
        if name != "base":
            assert "Paris" in capital_of_france(model, tokenizer)
    assert losses["aim"] < losses["base"]
    assert losses["arm"] < losses["base"]
