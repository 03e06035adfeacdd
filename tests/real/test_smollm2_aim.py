"""AIM on a real 135 M-parameter Llama, through the real commands, checked weight by weight."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from mergekit_arm.demo.text import DomainText
from mergekit_arm.demo.train import token_blocks
from mergekit_arm.judging.heldout import whole_text
from mergekit_arm.judging.loss import mean_loss
from tests.real.commands import call, merge
from tests.real.formula import assert_relaxed, mean_magnitudes
from tests.real.smollm2 import LENGTH, capital_of_france
from tests.support.merges import weights

pytestmark = [pytest.mark.real, pytest.mark.long]

OMEGA = 0.4
BLOCKS = 16
PARAMETERS = {"weight": 0.7}


@pytest.fixture(scope="module")
def text(corpora: dict[str, DomainText]) -> str:
    """One long text, so that no shuffling of rows decides how it is cut."""
    return "\n\n".join(corpora["general"].train)[:20_000].strip()


@pytest.fixture(scope="module")
def merges(
    base: Path,
    variants: dict[str, Path],
    text: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Merges by name of method, made by the commands that a user would type."""
    folder = tmp_path_factory.mktemp("merges")
    (folder / "calibration.jsonl").write_text(json.dumps({"text": text}) + "\n")
    call(
        "mergekit-arm", "calibrate", base, folder / "stats",
        "--dataset", folder / "calibration.jsonl", "--dtype", "float32",
        "--samples", BLOCKS, "--sequence-length", LENGTH, "--statistics", "importance",
    )  # fmt: skip
    config: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(one), "parameters": PARAMETERS} for one in variants.values()],
        "dtype": "float32",
    }
    merge(config, folder / "plain")
    config["merge_method"] = "aim"
    config["parameters"] = {"activation_stats": str(folder / "stats"), "omega": OMEGA}
    merge(config, folder / "aim")
    return {name: folder / name for name in ("plain", "aim")}


def test_every_weight_is_the_formula(base: Path, merges: dict[str, Path], text: str) -> None:
    ids = AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    blocks = torch.tensor(ids[: BLOCKS * LENGTH]).view(BLOCKS, LENGTH)
    plain = weights(merges["plain"])
    assert_relaxed(base, plain, merges["aim"], OMEGA, mean_magnitudes(base, blocks))


def test_merges_load_speak_and_know_both_texts(
    base: Path,
    variants: dict[str, Path],
    merges: dict[str, Path],
    corpora: dict[str, DomainText],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    heldout = {
        name: token_blocks(tokenizer, corpora[name].heldout, LENGTH)[:4] for name in variants
    }
    losses: dict[str, dict[str, float]] = {}
    for name, folder in {"base": base, **variants, **merges}.items():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        losses[name] = {
            domain: mean_loss(model, whole_text(blocks), 2) for domain, blocks in heldout.items()
        }
    # The last of them is aim.
    reply = capital_of_france(model, tokenizer)
    with capsys.disabled():
        sys.stdout.write("\nheld-out loss, nats per token\n")
        for name, row in losses.items():
            values = "  ".join(f"{domain} {loss:.3f}" for domain, loss in row.items())
            sys.stdout.write(f"  {name:10} {values}\n")

    for domain in variants:
        assert losses[domain][domain] < losses["base"][domain]
    assert sum(losses["aim"].values()) < sum(losses["base"].values())
    assert "Paris" in reply
