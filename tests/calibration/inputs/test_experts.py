"""Mixtures of experts: who sees which tokens, who is starved, and what a merge does then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.merge_methods import merge_state_dicts
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file
from torch.nn import functional
from transformers import Qwen3MoeForCausalLM

from mergekit_arm.cli.calibrate import command
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.read import Statistics
from tests.support.equality import assert_same_statistics
from tests.support.models import perturbed, tiny_experts

EXPERTS, STARVED, LAYERS = 4, 2, 2


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory, token_file: Path) -> Path:
    """``base`` and ``a``, a Qwen3-MoE whose routers pass expert 2 one token in a hundred."""
    folder = tmp_path_factory.mktemp("moe")
    model = tiny_experts(3, experts=EXPERTS, per_token=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for layer in model.model.layers:
            # Nearly the mean of the others' logits, so that it is rarely the largest.
            gate = layer.mlp.gate.weight
            others = torch.linalg.qr(torch.randn(32, EXPERTS)).Q.T
            gate.copy_(others)
            gate[STARVED] = 0.45 * (others[0] + others[1]) + 0.3 * others[2]
    model.save_pretrained(folder / "base")
    perturbed(model, 1).save_pretrained(folder / "a")
    return folder


def calibrate(moe: Path, token_file: Path, out: Path, *options: str) -> str:
    done = CliRunner().invoke(
        command,
        [str(moe / "base"), str(out), "--dataset", str(token_file), *options],
        env={"COLUMNS": "200"},
    )
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def stats(moe: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moe_stats") / "stats"
    calibrate(moe, token_file, out, "--min-expert-tokens", "60")
    return out


def routed(moe: Path, token_file: Path) -> list[list[torch.Tensor]]:
    """By layer and expert, the hidden states that a router of our own sends there."""
    model = Qwen3MoeForCausalLM.from_pretrained(moe / "base").eval()
    found: list[list[torch.Tensor]] = []
    inputs: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda _m, args, number=number: inputs[number].append(args[0].detach())
        )
    with torch.no_grad():
        for line in token_file.read_text().splitlines():
            model(torch.tensor([json.loads(line)["input_ids"]]))
    for number, layer in enumerate(model.model.layers):
        x = torch.cat([one.reshape(-1, 32) for one in inputs[number]])
        choice = (x @ layer.mlp.gate.weight.T).argmax(-1)
        found.append([x[choice == expert] for expert in range(EXPERTS)])
    return found


def test_every_expert_has_its_own_tokens(moe: Path, token_file: Path, stats: Path) -> None:
    opened = Statistics("stats", stats)
    model = Qwen3MoeForCausalLM.from_pretrained(moe / "base")
    for layer, shares in enumerate(routed(moe, token_file)):
        prefix = f"model.layers.{layer}.mlp.experts"
        tokens = opened.metadata.sites[f"{prefix}.gate_up_proj"].tokens
        assert tokens == opened.metadata.sites[f"{prefix}.down_proj"].tokens
        assert tokens == [len(share) for share in shares]
        assert 0 < tokens[STARVED] < 60 < min(t for e, t in enumerate(tokens) if e != STARVED)
        for expert, x in enumerate(shares):
            if expert == STARVED:
                continue
            record = opened.metadata.weights[f"{prefix}.{expert}.gate_proj.weight"]
            expected = x.abs().mean(0)
            torch.testing.assert_close(IMPORTANCE.values(opened, record, "mean_abs"), expected)
            gate, up = model.get_parameter(f"{prefix}.gate_up_proj")[expert].detach().split(24)
            middle = functional.silu(x @ gate.T) * (x @ up.T)
            record = opened.metadata.weights[f"{prefix}.{expert}.down_proj.weight"]
            found = IMPORTANCE.values(opened, record, "rms")
            torch.testing.assert_close(found, middle.square().mean(0).sqrt(), rtol=1e-4, atol=1e-6)


def test_the_starved_expert_is_reported(moe: Path, token_file: Path, tmp_path: Path) -> None:
    output = calibrate(moe, token_file, tmp_path / "stats", "--min-expert-tokens", "60")
    sites = Statistics("stats", tmp_path / "stats").metadata.sites
    tokens = [sites[f"model.layers.{i}.mlp.experts.down_proj"].tokens for i in range(LAYERS)]
    assert "2 experts saw fewer than 60 tokens, too few to be used" in output
    assert "24 weights: experts" in output  # without a subspace for arm
    assert "45 of 45 weights" in output
    for layer, counts in enumerate(tokens):
        assert f"model.layers.{layer}.mlp.experts[2] ({counts[STARVED]})" in output


def test_layer_by_layer_the_counts_are_the_same(
    moe: Path, token_file: Path, stats: Path, tmp_path: Path
) -> None:
    calibrate(moe, token_file, tmp_path / "stats", "--min-expert-tokens", "60", "--low-memory")
    assert_same_statistics(tmp_path / "stats", stats)


def test_the_starved_expert_is_left_as_merged(
    moe: Path, stats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merged = merge(moe, stats, tmp_path)
    base = fused(moe / "base")
    other = fused(moe / "a")
    checked = 0
    for name, weight in merged.items():
        if ".experts." not in name:
            continue
        task = other[name] - base[name]
        for expert in range(EXPERTS):
            moved = (weight[expert] - base[name][expert]).abs().mean()
            full = (base[name][expert] + task[expert] - weight[expert]).abs().max()
            if expert == STARVED:
                assert full < 1e-6  # weight 1: the other model, unrelaxed
            else:
                assert moved < 0.95 * task[expert].abs().mean()
            checked += 1
    assert checked == 2 * LAYERS * EXPERTS
    warnings = [
        record.message for record in caplog.records if "too few to be used" in record.message
    ]
    assert len(warnings) == 2 * LAYERS  # once for each fused weight
    assert "1 of 4 experts (2) saw fewer than 60 tokens" in warnings[0]


def test_without_a_minimum_every_expert_with_a_token_is_relaxed(
    moe: Path, token_file: Path, tmp_path: Path
) -> None:
    calibrate(moe, token_file, tmp_path / "stats", "--min-expert-tokens", "0")
    merged = merge(moe, tmp_path / "stats", tmp_path)
    base, other = fused(moe / "base"), fused(moe / "a")
    for name in base:
        assert not torch.allclose(merged[name][STARVED], other[name][STARVED], atol=1e-6)


def test_starved_experts_under_names_of_their_own(moe: Path, stats: Path) -> None:
    """As mergekit asks for them where its architecture file has one tensor for each expert."""
    states = {name: load_file(moe / name / "model.safetensors") for name in ("base", "a")}
    parameters = {"activation_stats": str(stats), "omega": 0.0, "weight": 1.0}
    merged = merge_state_dicts(states, "aim", base="base", parameters=parameters)
    names = [name for name in merged if ".experts." in name]
    assert len(names) == 3 * EXPERTS * LAYERS
    for name in names:
        untouched = torch.allclose(merged[name], states["a"][name], atol=1e-6)
        assert untouched == (f".experts.{STARVED}." in name), name


def test_arm_rotates_no_expert_and_says_so(
    moe: Path, stats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merged = merge(moe, stats, tmp_path, method="arm", rotation=-1.0)
    base, other = fused(moe / "base"), fused(moe / "a")
    for name in base:
        torch.testing.assert_close(merged[name], other[name], rtol=1e-5, atol=1e-6)
    query = "model.layers.0.self_attn.q_proj.weight"
    two = load_file(moe / "a" / "model.safetensors")[query]
    assert not torch.allclose(merged[query], two, atol=1e-3)
    (said,) = [record.message for record in caplog.records if "experts'" in record.message]
    assert "24 of 44 weights are experts', which have no subspaces" in said


def fused(path: Path) -> dict[str, torch.Tensor]:
    model = Qwen3MoeForCausalLM.from_pretrained(path)
    return {name: p.detach() for name, p in model.named_parameters() if ".experts." in name}


def merge(
    moe: Path, stats: Path, folder: Path, method: str = "aim", **parameters: Any
) -> dict[str, torch.Tensor]:
    own = {"weight": 1.0} if method == "aim" else {}
    config = {
        "merge_method": method,
        "base_model": str(moe / "base"),
        "models": [{"model": str(moe / "a"), "parameters": own}],
        "parameters": {"activation_stats": str(stats), **(parameters or {"omega": 0.0})},
        "dtype": "float32",
    }
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    done = CliRunner().invoke(
        mergekit_yaml, [str(folder / "config.yml"), str(folder / "out"), "--quiet"]
    )
    assert done.exit_code == 0, done.output
    return load_file(folder / "out" / "model.safetensors")
