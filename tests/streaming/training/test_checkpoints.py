"""Every form a checkpoint comes in: shards, pickles, adapters, half precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.scripts.run_yaml import main as mergekit_yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tests.support.merges import assert_relaxed, config, relaxed, run, weights
from tests.support.models import perturbed, tiny_llama


@pytest.mark.parametrize(
    "options",
    [["--lazy-unpickle"], ["--low-cpu-memory"], ["--out-shard-size", "20K"], ["--async-write"]],
)
def test_options_do_not_change_the_result(options: list[str], family: Path, tmp_path: Path) -> None:
    """From pickled checkpoints; mergekit opens these without unpickling only if told so."""
    for model in ("base", "a"):
        pickled(family / model, tmp_path / model)
    document = config(tmp_path)
    document["parameters"]["activation_stats"] = str(family / "stats")
    out = run(mergekit_yaml, yaml.safe_dump(document), tmp_path / "merge", *options)
    for name, tensor in weights(out).items():
        assert_relaxed(tensor, family, name)


def pickled(model: Path, out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text((model / "config.json").read_text())
    torch.save(load_file(model / "model.safetensors"), out / "pytorch_model.bin")


def pickled_shards(model: Path, out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text((model / "config.json").read_text())
    placed: dict[str, str] = {}
    names = sorted(weights(model))
    for number, some in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: weights(model)[name] for name in some}, out / file)
        placed |= dict.fromkeys(some, file)
    index = {"metadata": {}, "weight_map": placed}
    (out / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_pickled_and_sharded_checkpoints_have_the_same_statistics(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    pickled(family / "base", tmp_path / "bin")
    LlamaForCausalLM.from_pretrained(family / "base").save_pretrained(
        tmp_path / "shards", max_shard_size="20KB"
    )
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    pickled_shards(family / "base", tmp_path / "bin-shards")
    expected = load_file(family / "stats" / "model.safetensors")
    metadata = json.loads((family / "stats" / "activation_stats.json").read_text())
    for name in ("bin", "shards", "bin-shards"):
        measure(tmp_path / name, tmp_path / f"{name}-stats")
        found = load_file(tmp_path / f"{name}-stats" / "model.safetensors")
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        other = json.loads((tmp_path / f"{name}-stats" / "activation_stats.json").read_text())
        assert other["model"]["content_hash"] == metadata["model"]["content_hash"]


def test_adapters_as_model_and_as_base(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    for seed, name in ((5, "one"), (6, "two")):
        torch.manual_seed(seed)
        settings = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        adapted = get_peft_model(LlamaForCausalLM.from_pretrained(family / "base"), settings)
        adapted.save_pretrained(tmp_path / name)
        adapted.merge_and_unload().save_pretrained(tmp_path / f"{name}-merged")
    base, model = (f"{family / 'base'}+{tmp_path / name}" for name in ("one", "two"))
    (tmp_path / "cache").mkdir()
    measure(Path(base), tmp_path / "stats")
    document = config(tmp_path, base_model=base)
    document["models"][0]["model"] = model
    out = run(
        mergekit_yaml,
        yaml.safe_dump(document),
        tmp_path / "merge",
        "--lora-merge-cache",
        str(tmp_path / "cache"),
    )
    one, two = weights(tmp_path / "one-merged"), weights(tmp_path / "two-merged")
    moved = 0
    for name, tensor in weights(out).items():
        expected = relaxed(tmp_path, name, one[name], two[name])
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6, msg=name)
        moved += not torch.equal(one[name], two[name])
    assert moved == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints(
    dtype: torch.dtype, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    base = tiny_llama(0)
    perturbed(base, 1).to(dtype).save_pretrained(tmp_path / "a")
    base.to(dtype).save_pretrained(tmp_path / "base")
    measure(tmp_path / "base", tmp_path / "stats")
    for name, tensor in weights(
        run(mergekit_yaml, yaml.safe_dump(config(tmp_path)), tmp_path / "merge")
    ).items():
        assert_relaxed(tensor, tmp_path, name)
