"""``merge_method: regmean`` through mergekit, against dense float64 algebra on what is stored."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from tests.support.merges import as_merged, refused, run, weights
from tests.support.models import VOCABULARY, perturbed, tiny_llama, vary_norms
from tests.support.moments_reference import Stored, solved
from tests.support.stored import Folder

Measure = Callable[..., Path]

FEWEST = 150
"""Tokens below which an expert counts as starved."""


@pytest.fixture(scope="module")
def trio(family: Path, tmp_path_factory: pytest.TempPathFactory, measure: Measure) -> Path:
    """The Llama family, with a third fine-tune, and statistics of each model by its name."""
    folder = tmp_path_factory.mktemp("trio")
    base = tiny_llama(0)
    perturbed(base, 3).save_pretrained(folder / "c")
    for name in ("base", "a", "b"):
        (folder / name).symlink_to(family / name)
    for name in ("base", "a", "b", "c"):
        measure(folder / name, folder / f"{name}-stats")
    return folder


def save_family(folder: Path, base: PreTrainedModel, measure: Measure, **options: Any) -> Path:
    base.save_pretrained(folder / "base")
    for seed, name in enumerate(("a", "b"), start=1):
        perturbed(base, seed).save_pretrained(folder / name)
        measure(folder / name, folder / f"{name}-stats", **options)
    measure(folder / "base", folder / "base-stats", **options)
    return folder


def document(folder: Path, given: dict[str, float], **parameters: Any) -> dict[str, Any]:
    """A merge of the models ``given`` with their weights."""
    return {
        "merge_method": "regmean",
        "base_model": str(folder / "base"),
        "models": [
            {
                "model": str(folder / name),
                "parameters": {
                    "weight": weight,
                    "activation_stats": str(folder / f"{name}-stats"),
                },
            }
            for name, weight in given.items()
        ],
        "parameters": parameters,
        "dtype": "float32",
    }


def merge(found: dict[str, Any], folder: Path, *options: str) -> dict[str, Tensor]:
    return weights(run(mergekit_yaml, yaml.safe_dump(found), folder, *options))


def expected(
    folder: Path,
    name: str,
    given: dict[str, float],
    *,
    scale: float = 1.0,
    alpha: float = 0.9,
    ridge: float = 0.0,
    retain: float = 0.0,
    diagonal: bool = False,
) -> Tensor:
    """The merged weight, from dense second moments and least squares of stacked data."""
    base = as_merged(folder / "base")[name].double()
    tasks = [as_merged(folder / model)[name].double() - base for model in given]
    open_folders = {one: Folder.open(folder / f"{one}-stats") for one in ("base", *given)}
    stored = [open_folders[model].stored(name, diagonal=diagonal) for model in given]
    shares = np.array(list(given.values()))
    average = sum(w * task for w, task in zip(shares, tasks, strict=True)) / (shares.sum() or 1)
    if None in stored:
        return base + scale * average
    axis = open_folders["base"].record(name)["input_axis"] - base.ndim
    anchor = open_folders["base"].stored(name, diagonal=diagonal) if retain else None
    rows = [task.movedim(axis, -1) for task in tasks]
    update = torch.empty_like(rows[0])
    experts = [slice(None)] if base.ndim == 2 else list(range(base.shape[0]))
    for index, expert in enumerate(experts):
        moments = [_of(one, index).dense(alpha) for one in stored if one is not None]
        if not any(one.any() for one in moments):
            update[expert] = average.movedim(axis, -1)[expert]
            continue
        found = solved(
            moments,
            list(given.values()),
            [task[expert].numpy() for task in rows],
            None if anchor is None else _of(anchor, index).dense(alpha),
            retain,
            ridge,
        )
        update[expert] = torch.from_numpy(found)
    return base + scale * update.movedim(-1, axis)


def _of(stored: Stored, expert: int) -> Stored:
    if stored.diagonal.ndim == 1:
        return stored
    return Stored(stored.diagonal[expert], stored.basis, stored.eigenvalues)


def assert_regmean(
    found: dict[str, Tensor], folder: Path, given: dict[str, float], **settings: Any
) -> int:
    """Compare every tensor; return how many are not the plain average."""
    told_apart = 0
    base = as_merged(folder / "base")
    for name, tensor in found.items():
        wanted = expected(folder, name, given, **settings)
        torch.testing.assert_close(tensor.double(), wanted, rtol=2e-5, atol=2e-6, msg=name)
        shares = sum(given.values()) or 1
        average = base[name].double() + settings.get("scale", 1.0) * sum(
            w / shares * (as_merged(folder / model)[name].double() - base[name].double())
            for model, w in given.items()
        )
        told_apart += float((wanted - average).abs().max()) > 1e-4
    return told_apart


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"a": 1.0, "b": 1.0}, {}),
        ({"a": 0.3, "b": 2.0, "c": 1.0}, {"scale": 0.7, "ridge": 1e-3}),
        ({"a": 1.0, "b": 0.5}, {"retain": 0.4, "alpha": 0.5}),
        ({"a": 1.0, "b": 0.0}, {"alpha": 0.0}),
        ({"a": 1.0, "b": 3.0}, {"diagonal": True}),
    ],
    ids=["defaults", "three", "retaining", "zero weight", "diagonal"],
)
def test_a_llama(
    given: dict[str, float], settings: dict[str, Any], trio: Path, tmp_path: Path
) -> None:
    """Seven matrices in each of two layers; q, k and v share one input, and so do gate and up."""
    parameters = {key: value for key, value in settings.items() if key != "diagonal"}
    if "retain" in parameters:
        parameters["activation_stats"] = str(trio / "base-stats")
    if "diagonal" in settings:
        parameters["moments"] = "diagonal"
    found = merge(document(trio, given, **parameters), tmp_path)
    count = assert_regmean(found, trio, given, **settings)
    if 0.0 in given.values():
        assert count == 0  # the other model alone has a say
    else:
        assert count == 14 + settings.get("diagonal", False)  # with the head


def test_a_tied_head(tmp_path: Path, measure: Measure) -> None:
    folder = save_family(tmp_path, tiny_llama(4, tied=True), measure)
    given = {"a": 1.0, "b": 0.4}
    found = merge(document(folder, given), tmp_path / "merge")
    assert "lm_head.weight" not in found
    assert_regmean(found, folder, given)


def test_inputs_on_the_first_axis(tmp_path: Path, measure: Measure) -> None:
    """GPT-2 stores its matrices in × out, and has biases."""
    torch.manual_seed(6)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4))
    folder = save_family(tmp_path, base, measure)
    given = {"a": 1.0, "b": 0.4}
    found = merge(document(folder, given, ridge=1e-6), tmp_path / "merge")
    assert assert_regmean(found, folder, given, ridge=1e-6) == 8


def test_experts(tmp_path: Path, measure: Measure, caplog: pytest.LogCaptureFixture) -> None:
    """Each by its own energies; one that no model's text reached is averaged."""
    torch.manual_seed(7)
    base = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=5,
            num_experts_per_tok=2,
            max_position_embeddings=64,
        )
    )
    vary_norms(base)
    with torch.no_grad():  # two logits are always above 0, the last expert's of the first layer
        one = 50 * torch.randn(32)
        routes = torch.stack([one, 1.1 * one, -one, -1.1 * one, 0 * one])
        base.model.layers[0].mlp.gate.weight.copy_(routes)
    folder = save_family(tmp_path, base, measure, min_expert_tokens=FEWEST)
    given = {"a": 1.0, "b": 0.4}
    with caplog.at_level(logging.WARNING):
        found = merge(document(folder, given), tmp_path / "merge")
    starved = [
        tokens < FEWEST
        for model in given
        for site in Folder.open(folder / f"{model}-stats").metadata["sites"].values()
        if isinstance(site["tokens"], list)
        for tokens in site["tokens"]
    ]
    both = [one and other for one, other in zip(*np.split(np.array(starved), 2), strict=True)]
    assert sum(both) * 2 < sum(starved) < len(starved)  # in one model only, in both, in none
    assert any(both)
    assert assert_regmean(found, folder, given) > 8
    said = [
        record.message for record in caplog.records if "regmean averages them" in record.message
    ]
    assert len(said) == 1
    assert "experts', whose moments are diagonal" in said[0]


def test_what_is_averaged_is_said_once(
    trio: Path, tmp_path: Path, measure: Measure, caplog: pytest.LogCaptureFixture
) -> None:
    measure(trio / "a", tmp_path / "fresh")
    found = document(trio, {"a": 1.0, "b": 1.0})
    found["models"][0]["parameters"]["activation_stats"] = str(tmp_path / "fresh")
    merge(found, tmp_path)
    (said,) = [r.message for r in caplog.records if "regmean averages them" in r.message]
    # Five norms, the embedding and the head.
    assert "7 of 21 weights have no second moments" in said


def test_one_model_is_that_model(trio: Path, tmp_path: Path) -> None:
    found = merge(document(trio, {"a": 0.2}), tmp_path)
    for name, tensor in weights(trio / "a").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_models_with_the_same_statistics_are_averaged(trio: Path, tmp_path: Path) -> None:
    """Statistics of the base, with each model's own probes: nothing else differs."""
    given = {"a": 1.0, "b": 3.0}
    for name in given:
        _same_numbers(trio / f"{name}-stats", trio / "base-stats", tmp_path / f"{name}-stats")
        (tmp_path / name).symlink_to(trio / name)
    (tmp_path / "base").symlink_to(trio / "base")
    found = merge(document(tmp_path, given), tmp_path / "merge")
    plain = document(tmp_path, {"a": 0.25, "b": 0.75}) | {"merge_method": "task_arithmetic"}
    for model in plain["models"]:
        del model["parameters"]["activation_stats"]
    for name, tensor in merge(plain, tmp_path / "plain").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def _same_numbers(of: Path, numbers: Path, out: Path) -> None:
    shutil.copytree(of, out)
    own, others = (load_file(path / "model.safetensors") for path in (of, numbers))
    save_file({**others, "probes": own["probes"]}, out / "model.safetensors")
    first, second = (json.loads((p / "activation_stats.json").read_text()) for p in (of, numbers))
    first["sites"] = second["sites"]
    (out / "activation_stats.json").write_text(json.dumps(first))


def test_filters_and_gradients(trio: Path, tmp_path: Path) -> None:
    given = {"a": 1.0, "b": 0.5}
    found = document(
        trio,
        given,
        scale=[{"filter": "mlp", "value": [0.2, 1.0]}, {"value": 1.0}],
        alpha=[0.0, 0.9],
        moments=[{"filter": "o_proj", "value": "none"}, {"value": "full"}],
    )
    merged = merge(found, tmp_path)
    for layer, scale, alpha in ((0, 0.2, 0.0), (1, 1.0, 0.9)):
        for name in (one for one in merged if f"layers.{layer}." in one):
            if "o_proj" in name:
                base, a, b = (weights(trio / model)[name] for model in ("base", "a", "b"))
                wanted = (base + ((a - base) + 0.5 * (b - base)) / 1.5).double()
            else:
                here = scale if "mlp" in name else 1.0
                wanted = expected(trio, name, given, scale=here, alpha=alpha)
            torch.testing.assert_close(merged[name].double(), wanted, rtol=2e-5, atol=2e-6)


def test_many_shards_and_a_lazy_loader_give_the_same(trio: Path, tmp_path: Path) -> None:
    found = document(trio, {"a": 1.0, "b": 0.5})
    whole = merge(found, tmp_path / "one")
    options = ("--out-shard-size", "20K", "--lazy-unpickle", "--low-cpu-memory")
    parts = merge(found, tmp_path / "many", *options[:2])
    assert len(list((tmp_path / "many" / "out").glob("*.safetensors"))) > 3
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_slices_use_the_statistics_of_the_layer_that_was_taken(trio: Path, tmp_path: Path) -> None:
    found = document(trio, {"a": 1.0, "b": 0.5})
    models = [{"model": found["base_model"]}, *found.pop("models")]
    found["slices"] = [{"sources": [{**one, "layer_range": [1, 2]} for one in models]}]
    merged = merge(found, tmp_path)
    compared = 0
    for name, tensor in merged.items():
        if "layers.0" in name:
            source = name.replace("layers.0", "layers.1")
            wanted = expected(trio, source, {"a": 1.0, "b": 0.5})
            torch.testing.assert_close(tensor.double(), wanted, rtol=2e-5, atol=2e-6, msg=name)
            compared += 1
    assert compared == 9


def test_aim_over_it(trio: Path, tmp_path: Path) -> None:
    given = {"a": 1.0, "b": 0.5}
    found = document(trio, given, omega=0.2) | {"merge_method": "aim_regmean"}
    line = refused(yaml.safe_dump(found), tmp_path)
    assert f"aim_regmean needs statistics of {trio / 'base'} itself" in line
    found["parameters"]["activation_stats"] = str(trio / "base-stats")
    merged = merge(found, tmp_path / "merge")
    name = "model.layers.1.mlp.down_proj.weight"
    base = weights(trio / "base")[name].double()
    folder = Folder.open(trio / "base-stats")
    importance = folder.tensors[f"{folder.record(name)['site']}.abs_sum"].double()
    gain = 1 - 0.8 * importance / importance.max()
    wanted = base + (expected(trio, name, given) - base) * gain
    torch.testing.assert_close(merged[name].double(), wanted, rtol=2e-5, atol=2e-6)


def test_every_model_needs_its_own(trio: Path, tmp_path: Path) -> None:
    found = document(trio, {"a": 1.0, "b": 1.0})
    del found["models"][1]["parameters"]["activation_stats"]
    line = refused(yaml.safe_dump(found), tmp_path)
    wanted = f"regmean needs statistics of {trio / 'b'} itself"
    assert wanted in line
    found["parameters"]["activation_stats"] = str(trio / "base-stats")  # never used silently
    assert wanted in refused(yaml.safe_dump(found), tmp_path)
    found["models"][1]["parameters"]["activation_stats"] = str(trio / "a-stats")
    assert "another model or revision" in refused(yaml.safe_dump(found), tmp_path)
    assert not (tmp_path / "out").exists()


def test_retaining_needs_the_bases(trio: Path, tmp_path: Path) -> None:
    found = document(trio, {"a": 1.0}, retain=0.5)
    line = refused(yaml.safe_dump(found), tmp_path)
    assert f"regmean needs statistics of {trio / 'base'} itself" in line
    assert "set activation_stats under the top-level parameters" in line


def test_importance_alone_needs_consent(trio: Path, tmp_path: Path, measure: Measure) -> None:
    measure(trio / "a", tmp_path / "a-stats", statistics=("importance",))
    found = document(trio, {"a": 1.0, "b": 1.0})
    found["models"][0]["parameters"]["activation_stats"] = str(tmp_path / "a-stats")
    line = refused(yaml.safe_dump(found), tmp_path)
    assert f"activation_stats {tmp_path / 'a-stats'} hold importance and no subspace" in line
    assert "calibrate again with --statistics all, or set moments: diagonal" in line
    assert not (tmp_path / "out").exists()
    found["parameters"]["moments"] = "diagonal"
    merged = merge(found, tmp_path / "merge")
    assert_regmean(merged, trio, {"a": 1.0, "b": 1.0}, diagonal=True)


def test_subspaces_alone_are_not_enough(trio: Path, tmp_path: Path, measure: Measure) -> None:
    measure(trio / "a", tmp_path / "a-stats", statistics=("subspace",))
    found = document(trio, {"a": 1.0})
    found["models"][0]["parameters"]["activation_stats"] = str(tmp_path / "a-stats")
    for moments in ("full", "diagonal"):
        found["parameters"]["moments"] = moments
        line = refused(yaml.safe_dump(found), tmp_path)
        assert "hold subspace and no importance" in line
        assert line.endswith("--statistics all")


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale", -0.1), ("alpha", 1.5), ("ridge", -1), ("retain", float("inf")), ("weight", -1)],
)
def test_parameters_outside_their_range(
    name: str, value: float, trio: Path, tmp_path: Path
) -> None:
    found = document(trio, {"a": 1.0})
    where = found["models"][0] if name == "weight" else found
    where["parameters"][name] = value
    assert f"{name} must lie in" in refused(yaml.safe_dump(found), tmp_path)
    assert not (tmp_path / "out").exists()
