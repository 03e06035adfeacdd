"""mergekit's own features with arm: gradients, slices, vocabularies, threads, other commands."""

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
from transformers import AutoTokenizer

from tests.support.merges import run, weights
from tests.support.models import perturbed, tiny_llama
from tests.support.streams import write_with_another_token

RATE = 0.7


def config(folder: Path, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": "arm",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "a"), "parameters": {"learning_rate": RATE}}],
        "parameters": {"activation_stats": str(folder / "stats"), **parameters},
        "dtype": "float32",
    }


def sliced(folder: Path, *ranges: tuple[int, int]) -> str:
    document = config(folder)
    (model,) = document.pop("models")
    document["slices"] = [
        {
            "sources": [
                {"model": str(folder / "base"), "layer_range": list(one)},
                {**model, "layer_range": list(one)},
            ]
        }
        for one in ranges
    ]
    return yaml.safe_dump(document)


def step(folder: Path, **parameters: Any) -> dict[str, Tensor]:
    """One step on all tensors with the same settings."""
    settings = {"activation_stats": str(folder / "stats"), "learning_rate": RATE, **parameters}
    states = {name: weights(folder / name) for name in ("base", "a")}
    merged: dict[str, Tensor] = merge_state_dicts(states, "arm", base="base", parameters=settings)
    return merged


def test_gradients_and_filters_of_rate_and_alignment(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    own = str(measure(family / "a", tmp_path / "own"))
    document = config(
        family, alignment=[{"filter": "self_attn", "value": [0.0, 1.0]}, {"value": 0.5}]
    )
    document["models"][0]["parameters"] = {
        "learning_rate": [{"filter": "mlp", "value": [0.2, 1.0]}, {"value": 0.6}],
        "activation_stats": own,
    }
    found = weights(run(mergekit_yaml, yaml.safe_dump(document), tmp_path / "merge"))
    stats = {"base": str(family / "stats"), "a": own}
    compared = 0
    for layer in (0, 1):
        for part, rate, alignment in (
            ("mlp", (0.2, 1.0)[layer], 0.5),
            ("self_attn", 0.6, float(layer)),
        ):
            wanted = step(family, activation_stats=stats, learning_rate=rate, alignment=alignment)
            for name in (name for name in found if f"layers.{layer}.{part}" in name):
                torch.testing.assert_close(found[name], wanted[name], msg=name)
                compared += 1
    assert compared == 14


def test_layers_repeated_and_reordered(family: Path, tmp_path: Path) -> None:
    found = weights(run(mergekit_yaml, sliced(family, (1, 2), (0, 2), (0, 1)), tmp_path))
    wanted, taken = step(family), [1, 0, 1, 0]
    for name, tensor in found.items():
        source = name
        if ".layers." in name:
            number = int(name.split(".")[2])
            source = name.replace(f"layers.{number}.", f"layers.{taken[number]}.")
        assert torch.equal(tensor, wanted[source]), name
    assert len({name.split(".")[2] for name in found if ".layers." in name}) == 4


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory, measure: Callable[..., Path]) -> Path:
    """A family whose two layers have one matrix in common."""
    folder = tmp_path_factory.mktemp("alike")
    base = tiny_llama(0)
    first, second = base.model.layers
    second.mlp.up_proj.weight.data.copy_(first.mlp.up_proj.weight)
    base.save_pretrained(folder / "base")
    perturbed(base, 1).save_pretrained(folder / "a")
    measure(folder / "base", folder / "stats")
    return folder


def test_equal_matrices_of_renumbered_layers_have_their_own_statistics(
    alike: Path, tmp_path: Path
) -> None:
    """Their values do not tell the layers apart; mergekit's plan does."""
    found = weights(run(mergekit_yaml, sliced(alike, (1, 2), (0, 1)), tmp_path))
    wanted = step(alike)
    for number, taken in ((0, 1), (1, 0)):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(found[name.format(number)], wanted[name.format(taken)])


def test_equal_matrices_of_layers_in_their_places_are_not(alike: Path, tmp_path: Path) -> None:
    found = weights(run(mergekit_yaml, sliced(alike, (0, 2)), tmp_path))
    wanted = step(alike)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


@pytest.mark.parametrize("source", ["union", "base"])
def test_different_vocabularies(source: str, tmp_path: Path, measure: Callable[..., Path]) -> None:
    tokenizer = write_with_another_token(tmp_path)
    size = len(tokenizer) - 1
    measure(tmp_path / "base", tmp_path / "stats")
    document = config(tmp_path) | {"tokenizer": {"source": source}}
    found = weights(run(mergekit_yaml, yaml.safe_dump(document), tmp_path / "merge"))
    one, two = weights(tmp_path / "base"), weights(tmp_path / "a")
    merged = AutoTokenizer.from_pretrained(tmp_path / "merge" / "out").get_vocab()
    known = {token: number for token, number in merged.items() if token != "<call>"}
    rows = torch.tensor([tokenizer.get_vocab()[token] for token in known])
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert len(found[name]) == size + (source == "union")
        wanted = one[name][rows] + RATE * (two[name][rows] - one[name][rows])
        torch.testing.assert_close(found[name][torch.tensor(list(known.values()))], wanted)
    settings = {"activation_stats": str(tmp_path / "stats"), "learning_rate": RATE}
    body = {"base": one, "a": two}
    for state in body.values():
        del state["lm_head.weight"], state["model.embed_tokens.weight"]
    turned = merge_state_dicts(body, "arm", base="base", parameters=settings)
    assert all(torch.equal(found[name], tensor) for name, tensor in turned.items())


def test_a_stage_of_mergekit_multi(family: Path, tmp_path: Path) -> None:
    stage = config(family) | {"name": "stepped"}
    final = {
        "merge_method": "linear",
        "models": [
            {"model": name, "parameters": {"weight": 1.0}}
            for name in ("stepped", str(family / "b"))
        ],
        "dtype": "float32",
    }
    found = weights(run(mergekit_multi, yaml.safe_dump_all([stage, final]), tmp_path, multi=True))
    b = weights(family / "b")
    for name, tensor in step(family).items():
        torch.testing.assert_close(found[name], (tensor + b[name]) / 2)


def test_mergekit_pytorch(family: Path, tmp_path: Path) -> None:
    document = config(family)
    document["base_model"] += "/model.safetensors"
    document["models"][0]["model"] += "/model.safetensors"
    found = weights(run(mergekit_pytorch, yaml.safe_dump(document), tmp_path))
    wanted = step(family)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert len(found) == len(wanted)


def test_many_threads_at_once(family: Path) -> None:
    """Each with settings of its own: the last basis that was read is kept for every thread."""
    energies = [0.5, 0.7, 0.9]
    wanted = {energy: step(family, energy=energy) for energy in energies}
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda energy: step(family, energy=energy), energies * 6))
    assert not torch.equal(*(wanted[e]["model.layers.0.mlp.up_proj.weight"] for e in (0.5, 0.9)))
    for energy, merged in zip(energies * 6, results, strict=True):
        assert all(torch.equal(merged[name], t) for name, t in wanted[energy].items())
