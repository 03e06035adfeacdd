"""mergekit's own features with our methods, through its real commands."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.merge_methods import merge_state_dicts
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from mergekit.scripts.multimerge import main as mergekit_multi
from mergekit.scripts.run_yaml import main as mergekit_yaml
from torch import Tensor
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.read import Statistics
from tests.support.merges import OMEGA, assert_relaxed, config, relaxed, run, weights
from tests.support.models import perturbed
from tests.support.streams import write_with_another_token


def sliced(folder: Path, *ranges: tuple[int, int], **changes: Any) -> str:
    document = config(folder, **changes)
    del document["models"]
    document["slices"] = [
        {
            "sources": [
                {"model": str(folder / "base"), "layer_range": list(one)},
                {
                    "model": str(folder / "a"),
                    "layer_range": list(one),
                    "parameters": {"weight": 1.0},
                },
            ]
        }
        for one in ranges
    ]
    return yaml.safe_dump(document)


def test_layers_repeated_and_reordered(family: Path, tmp_path: Path) -> None:
    out = run(mergekit_yaml, sliced(family, (1, 2), (0, 2), (0, 1)), tmp_path)
    found = weights(out)
    taken = [1, 0, 1, 0]
    for name, tensor in found.items():
        source = name
        if ".layers." in name:
            number = int(name.split(".")[2])
            source = name.replace(f"layers.{number}.", f"layers.{taken[number]}.")
        assert_relaxed(tensor, family, source)
    assert len({name.split(".")[2] for name in found if ".layers." in name}) == 4


def test_equal_norms_of_renumbered_layers_have_their_own_statistics(
    alike: Path, tmp_path: Path
) -> None:
    """Their values do not tell the layers apart; mergekit's plan does."""
    found = weights(run(mergekit_yaml, sliced(alike, (1, 2), (0, 1)), tmp_path))
    base, other = weights(alike / "base"), weights(alike / "a")
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        names = [f"model.layers.{number}.{norm}" for number in (0, 1)]
        assert torch.equal(*(base[name] for name in names))
        for name, taken in zip(names, reversed(names), strict=True):
            assert_relaxed(found[name], alike, taken)
            wrong = relaxed(alike, name, base[taken], other[taken])
            assert not torch.allclose(found[name].double(), wrong, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranges", [[(0, 2)], None])
def test_equal_norms_of_layers_in_their_places_are_not(
    ranges: list[tuple[int, int]] | None, alike: Path, tmp_path: Path
) -> None:
    document = sliced(alike, *ranges) if ranges else yaml.safe_dump(config(alike))
    for name, tensor in weights(run(mergekit_yaml, document, tmp_path)).items():
        assert_relaxed(tensor, alike, name)


def test_equal_norms_left_as_merged_by_name(alike: Path, tmp_path: Path) -> None:
    omega = [{"filter": "layernorm", "value": 1.0}, {"value": OMEGA}]
    parameters = {"activation_stats": str(alike / "stats"), "omega": omega}
    out = run(mergekit_yaml, sliced(alike, (1, 2), (0, 1), parameters=parameters), tmp_path)
    found = weights(out)
    other = weights(alike / "a")
    for number, taken in enumerate((1, 0)):
        norm = "model.layers.{}.input_layernorm.weight"
        assert torch.equal(found[norm.format(number)], other[norm.format(taken)])
        name = "model.layers.{}.mlp.up_proj.weight"
        assert_relaxed(found[name.format(number)], alike, name.format(taken))


@pytest.mark.parametrize("source", ["union", "base"])
def test_different_vocabularies(source: str, tmp_path: Path, measure: Callable[..., Path]) -> None:
    tokenizer = write_with_another_token(tmp_path)
    size = len(tokenizer) - 1
    measure(tmp_path / "base", tmp_path / "stats")
    document = config(tmp_path, tokenizer={"source": source})
    found = weights(run(mergekit_yaml, yaml.safe_dump(document), tmp_path / "merge"))
    assert found["lm_head.weight"].shape[0] == size + (source == "union")
    merged_ids = AutoTokenizer.from_pretrained(tmp_path / "merge" / "out").get_vocab()
    base_ids = tokenizer.get_vocab()
    assert len(merged_ids) == size + (source == "union")
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        one, two = weights(tmp_path / "base")[name], weights(tmp_path / "a")[name]
        if name != "model.norm.weight":
            tokens = [token for token in merged_ids if base_ids[token] < size]
            rows = torch.tensor([base_ids[token] for token in tokens])
            one, two = one[rows], two[rows]
            found[name] = found[name][torch.tensor([merged_ids[token] for token in tokens])]
        expected = relaxed(tmp_path, name, one, two)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_modules_with_settings_of_their_own(tmp_path: Path, measure: Callable[..., Path]) -> None:
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(
            vocab_size=96,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
    )
    perturbed(base, 3, 0.2).save_pretrained(tmp_path / "base")
    perturbed(base, 4, 0.2).save_pretrained(tmp_path / "a")
    measure(tmp_path / "base", tmp_path / "stats")
    document = config(tmp_path)
    models = document.pop("models")
    half = [{"model": str(tmp_path / "a"), "parameters": {"weight": 0.5}}]
    document["modules"] = {
        "encoder": {"models": half},
        "decoder": {"models": models},
        "shared": {"models": models},
    }
    found = weights(run(mergekit_yaml, yaml.safe_dump(document), tmp_path / "merge"))
    one, two = weights(tmp_path / "base"), weights(tmp_path / "a")
    assert set(found) == set(one)
    for name, tensor in found.items():
        merged = one[name] + (0.5 if name.startswith("encoder") else 1) * (two[name] - one[name])
        expected = relaxed(tmp_path, name, one[name], merged)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_gradients_and_filters_on_every_parameter(family: Path, tmp_path: Path) -> None:
    document = config(family)
    document["models"][0]["parameters"] = {
        "weight": [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 1.0}]
    }
    document["parameters"] |= {
        "omega": [{"filter": "self_attn", "value": [0.0, 0.5]}, {"value": 0.9}],
        "importance": [{"filter": "o_proj", "value": "rms"}, {"value": "mean_abs"}],
    }
    found = weights(run(mergekit_yaml, yaml.safe_dump(document), tmp_path))
    one, two = weights(family / "base"), weights(family / "a")
    statistics = Statistics("stats", family / "stats")
    for name, tensor in found.items():
        record = statistics.metadata.weights[name]
        last = float(".layers.1." in name)  # the gradient's place in a model of two layers
        weight = 0.2 + 0.6 * last if "mlp" in name else 1.0
        omega = 0.5 * last if "self_attn" in name else 0.9
        merged = (one[name] + weight * (two[name] - one[name])).double()
        if record.site:
            values = IMPORTANCE.values(
                statistics, record, "rms" if "o_proj" in name else "mean_abs"
            )
            gain = 1 - (1 - omega) * values.double() / values.max()
            merged = one[name].double() + (merged - one[name].double()) * gain
        torch.testing.assert_close(tensor.double(), merged, rtol=1e-5, atol=1e-6, msg=name)


def test_a_stage_of_ours_in_mergekit_multi(family: Path, tmp_path: Path) -> None:
    stage = config(family) | {"name": "relaxed"}
    final = {
        "merge_method": "linear",
        "models": [
            {"model": "relaxed", "parameters": {"weight": 1.0}},
            {"model": str(family / "b"), "parameters": {"weight": 1.0}},
        ],
        "dtype": "float32",
    }
    out = run(mergekit_multi, yaml.safe_dump_all([stage, final]), tmp_path, multi=True)
    found, b = weights(out), weights(family / "b")
    for name, tensor in weights(tmp_path / "stages" / "relaxed").items():
        assert_relaxed(tensor, family, name)
        torch.testing.assert_close(found[name], (tensor + b[name]) / 2)


def test_mergekit_pytorch(family: Path, tmp_path: Path) -> None:
    document = config(family, base_model=str(family / "base" / "model.safetensors"))
    document["models"][0]["model"] = str(family / "a" / "model.safetensors")
    for name, tensor in weights(run(mergekit_pytorch, yaml.safe_dump(document), tmp_path)).items():
        assert_relaxed(tensor, family, name)


def test_many_threads_at_once(family: Path) -> None:
    """As mergekit's multi-GPU executor does, with the statistics opened by all of them."""
    states = {name: weights(family / name) for name in ("base", "a")}

    def merge(_: int) -> dict[str, Tensor]:
        merged: dict[str, Tensor] = merge_state_dicts(
            states,
            "aim",
            base="base",
            parameters={"activation_stats": str(family / "stats"), "omega": OMEGA, "weight": 1.0},
        )
        return merged

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(merge, range(24)))
    for name, tensor in results[0].items():
        assert_relaxed(tensor, family, name)
        assert all(torch.equal(other[name], tensor) for other in results)
