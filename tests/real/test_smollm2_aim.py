"""AIM on a real 135 M-parameter Llama, through the real commands, checked weight by weight."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM

from mergekit_arm.demo.text import DomainText
from mergekit_arm.demo.train import token_blocks
from mergekit_arm.judging.heldout import whole_text
from mergekit_arm.judging.loss import mean_loss
from tests.real.commands import call, merge
from tests.real.smollm2 import LENGTH, capital_of_france
from tests.support.merges import weights

pytestmark = pytest.mark.real

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


@pytest.fixture(scope="module")
def importance(base: Path, text: str) -> dict[str, Tensor]:
    """Mean |x| of what every weight of the base reads, by the weight's name, recorded here."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(text)["input_ids"]
    blocks = torch.tensor(ids[: BLOCKS * LENGTH]).view(BLOCKS, LENGTH)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    sums: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> None:
        total = x.double().abs().flatten(0, -2).sum(0)
        sums[name] = sums.get(name, torch.zeros_like(total)) + total

    for name, module in model.model.named_modules(prefix="model"):
        if isinstance(module, nn.Linear) or "norm" in name:
            module.register_forward_pre_hook(
                lambda _, inputs, name=f"{name}.weight": record(name, inputs[0])
            )
    # The embeddings are tied: as lm_head, their matrix reads what the final norm writes.
    model.model.norm.register_forward_hook(
        lambda _, inputs, output: record("model.embed_tokens.weight", output)
    )
    with torch.inference_mode():
        for block in blocks:
            model.model(input_ids=block[None])
    return {name: total / blocks.numel() for name, total in sums.items()}


def test_every_weight_is_the_formula(
    base: Path, merges: dict[str, Path], importance: dict[str, Tensor]
) -> None:
    before, merged, found = map(weights, (base, merges["plain"], merges["aim"]))
    assert set(before) == set(merged) == set(found) == set(importance)
    for name, start in before.items():
        start, plain = start.double(), merged[name].double()
        keep = 1 - (1 - OMEGA) * importance[name] / importance[name].max()
        wanted = start + (plain - start) * keep
        # An error in the update must not hide behind a weight that is much larger than it.
        tolerance = 1e-4 * float((plain - start).abs().max()) + 1e-7 * float(plain.abs().max())
        torch.testing.assert_close(
            found[name].double(), wanted, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
        relaxed = float((found[name] - merged[name]).abs().max())
        assert relaxed > 10 * tolerance, f"{name} was left as merged"


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
