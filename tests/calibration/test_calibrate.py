"""A calibration from start to end, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mergekit_arm.calibration.calibrate import CalibrationOptions, calibrate
from mergekit_arm.errors import Failure, InputError
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.read import Statistics
from tests.support.equality import assert_same_statistics, load_statistics
from tests.support.models import VOCABULARY, tiny_llama


def layer_inputs(model: nn.Module, token_file: Path) -> dict[str, list[torch.Tensor]]:
    """Every leaf layer's inputs, row by row of the data and whole model by whole model."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        layer.register_forward_hook(
            lambda _layer, args, _out, name=name: seen.setdefault(name, []).append(
                args[0].detach().double()
            )
        )
        for name, layer in model.named_modules()
        if not list(layer.children()) and not isinstance(layer, nn.Embedding)
    ]
    with torch.no_grad():
        for line in token_file.read_text().splitlines():
            model(torch.tensor([json.loads(line)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_has_the_sums_of_its_own_input(
    tied: bool, tmp_path: Path, token_file: Path, measure: Callable[..., Path]
) -> None:
    model = tiny_llama(4, tied=tied)
    model.save_pretrained(tmp_path / "model")
    stats = Statistics("stats", measure(tmp_path / "model", tmp_path / "stats"))
    inputs = layer_inputs(model.float().eval(), token_file)
    checkpoint = load_file(tmp_path / "model" / "model.safetensors")
    assert set(stats.metadata.weights) == set(checkpoint)
    for name, record in stats.metadata.weights.items():
        layer = name.removesuffix(".weight")
        if name == "model.embed_tokens.weight":
            assert (record.site is None) is not tied
            layer = "lm_head"
            if not tied:
                assert record.reason == "embedding"
                continue
        rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs[layer]])
        assert record.site is not None
        assert stats.metadata.sites[record.site].tokens == len(rows)
        found = IMPORTANCE.values(stats, record, "mean_abs").double()
        torch.testing.assert_close(found, rows.abs().mean(0), rtol=1e-5, atol=1e-9, msg=name)
        found = IMPORTANCE.values(stats, record, "rms").double()
        torch.testing.assert_close(found, rows.square().mean(0).sqrt(), rtol=1e-5, atol=1e-9)


def test_layers_that_read_one_tensor_share_a_site(family: Path) -> None:
    weights = Statistics("stats", family / "stats").metadata.weights
    sites = {name.split(".", 3)[-1]: r.site for name, r in weights.items() if "layers.1" in name}
    attention = {sites[f"self_attn.{part}_proj.weight"] for part in "qkv"}
    assert attention == {"model.layers.1.self_attn.q_proj"}
    assert sites["mlp.up_proj.weight"] == sites["mlp.gate_proj.weight"]
    assert len(set(sites.values())) == 6


def test_gpt2_has_its_input_axis_first(
    tmp_path: Path, token_file: Path, measure: Callable[..., Path]
) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path / "model")
    stats = Statistics("stats", measure(tmp_path / "model", tmp_path / "stats"))
    inputs = layer_inputs(model.eval(), token_file)
    record = stats.metadata.weights["transformer.h.1.mlp.c_proj.weight"]
    assert record.shape == [96, 24]
    assert record.input_axis == 0
    rows = torch.cat([x.reshape(-1, 96) for x in inputs["transformer.h.1.mlp.c_proj"]])
    found = IMPORTANCE.values(stats, record, "mean_abs").double()
    torch.testing.assert_close(found, rows.abs().mean(0), rtol=1e-5, atol=1e-9)


def test_the_head_is_measured_but_never_runs(
    family: Path, tmp_path: Path, measure: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    widest = 0
    plain = nn.functional.linear

    def recording(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal widest
        widest = max(widest, weight.shape[0])
        return plain(x, weight, *rest)

    monkeypatch.setattr(nn.functional, "linear", recording)
    measure(family / "base", tmp_path / "stats")
    assert 0 < widest < VOCABULARY
    assert (tmp_path / "stats" / "model.safetensors").read_bytes() == (
        family / "stats" / "model.safetensors"
    ).read_bytes()


def test_the_batch_size_does_not_matter(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    measure(family / "base", tmp_path / "one", batch_size=1)
    assert_same_statistics(tmp_path / "one", family / "stats")


def test_bfloat16_forward_passes_are_close(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    measure(family / "base", tmp_path / "half", dtype="bfloat16")
    folders = (tmp_path / "half", family / "stats")
    one, other = (Statistics("s", path) for path in folders)
    probes = [load_statistics(path)[1]["probes"] for path in folders]
    assert torch.equal(*probes)  # from the checkpoint, not the cast model
    for record in other.metadata.weights.values():
        if record.site:
            torch.testing.assert_close(
                IMPORTANCE.values(one, record, "rms"),
                IMPORTANCE.values(other, record, "rms"),
                rtol=0.05,
                atol=0.01,
            )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite_is_named(
    bad: float, family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(family / "base")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 4] = bad
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(Failure, match=r"model\.layers\.1\.post_attention_layernorm\.weight"):
        measure(tmp_path / "broken", tmp_path / "stats")
    assert not (tmp_path / "stats").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]  # nothing half-written


def test_tokens_of_another_vocabulary(family: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"input_ids": [1, 2, VOCABULARY]}) + "\n")
    with pytest.raises(InputError, match="another tokenizer"):
        calibrate(
            CalibrationOptions(
                model=str(family / "base"),
                out=str(tmp_path / "stats"),
                dataset=str(tmp_path / "data.jsonl"),
            )
        )


def test_existing_directories(family: Path, tmp_path: Path, measure: Callable[..., Path]) -> None:
    measure(family / "base", tmp_path / "stats")
    first = (tmp_path / "stats" / "activation_stats.json").read_bytes()
    with pytest.raises(InputError, match="add --force"):
        measure(family / "base", tmp_path / "stats")
    measure(family / "base", tmp_path / "stats", force=True)
    assert (tmp_path / "stats" / "activation_stats.json").read_bytes() == first
    (tmp_path / "stats" / "others").mkdir()
    with pytest.raises(InputError, match=r"holds others beside its statistics, and --force would"):
        measure(family / "base", tmp_path / "stats", force=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("precious")
    with pytest.raises(InputError, match="holds no statistics"):
        measure(family / "base", tmp_path / "model", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "stats"]


def test_a_sample_without_a_token_is_refused(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    """Subspaces of nothing would let arm take a plain step."""
    with pytest.raises(InputError, match=r"--skip-first \d+ leaves no token for subspace"):
        measure(family / "base", tmp_path / "stats", skip_first=10_000)
    measure(family / "base", tmp_path / "stats", skip_first=10_000, statistics=("importance",))


def test_quantised_models_are_refused(family: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(family / "base")
    model.save_pretrained(tmp_path / "quantised")
    settings = json.loads((tmp_path / "quantised" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="quantised"):
        calibrate(CalibrationOptions(model=str(tmp_path / "quantised"), out=str(tmp_path / "s")))


def test_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a local directory, a Hub id"):
        calibrate(CalibrationOptions(model=str(tmp_path), out=str(tmp_path / "s")))


def test_statistics_are_found_again_when_the_directory_is_replaced(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    from mergekit_arm.statistics.read import open_statistics

    measure(family / "base", tmp_path / "stats")
    first = open_statistics(str(tmp_path / "stats"))
    assert open_statistics(str(tmp_path / "stats")) is first
    measure(family / "a", tmp_path / "stats", force=True)
    again = open_statistics(str(tmp_path / "stats"))
    assert again.metadata.model.content_hash != first.metadata.model.content_hash


def test_a_tensor_that_transformers_does_not_load_is_listed(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(family / "base")
    model.save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["extra.weight"] = torch.randn(4, 4)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    stats = Statistics("s", measure(tmp_path / "model", tmp_path / "stats"))
    assert "not a parameter" in (stats.metadata.weights["extra.weight"].reason or "")
