"""A trial's model is the same to the byte, merged into a loaded model or by ``run_merge``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import PreTrainedModel

from mergekit_arm.errors import Failure
from mergekit_arm.judging.judge import Judge
from mergekit_arm.judging.sets import HeldOutSet
from mergekit_arm.tuning.merging import KeptTensors, Workshop
from tests.support.models import perturbed, tiny_experts, tiny_llama
from tests.support.streams import write_with_another_token

FILTERED = [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 1}]


def tied() -> PreTrainedModel:
    return tiny_llama(0, tied=True)


def untied() -> PreTrainedModel:
    return tiny_llama(0, tied=False)


def experts() -> PreTrainedModel:
    return tiny_experts(0)


def family(folder: Path, make: Callable[[], PreTrainedModel]) -> None:
    base = make()
    base.save_pretrained(folder / "base")
    for name, seed in (("a", 1), ("b", 2)):
        perturbed(base, seed).save_pretrained(folder / name)


def document(folder: Path, method: str, weight: Any, **changes: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / "a"), "parameters": {"weight": weight, "density": 0.6}},
            {"model": str(folder / "b"), "parameters": {"weight": 0.3, "density": 0.7}},
        ],
        "dtype": "float32",
        **changes,
    }


def workshop(folder: Path, *, in_memory: bool, seed: int | None = None) -> Workshop:
    options = MergeOptions(quiet=True, write_model_card=False, random_seed=seed)
    judge = Judge({"x": HeldOutSet(dataset="unread")}, [], options, device="cpu", dtype="float32")
    return Workshop(judge, options, folder, in_memory=in_memory)


def everything(shop: Workshop, document: dict[str, Any]) -> dict[str, torch.Tensor]:
    model = shop.model(document, on_disk=False)
    assert model is not None
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(folder: Path, documents: list[dict[str, Any]], seed: int | None = None) -> None:
    """The first is loaded from files by either way; the later ones are what is compared."""
    memory = workshop(folder / "one", in_memory=True, seed=seed)
    disk = workshop(folder / "two", in_memory=False, seed=seed)
    found = [everything(memory, one) for one in documents]
    LoaderCache.loaders.clear()
    expected = [everything(disk, one) for one in documents]
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("make", [tied, untied, experts])
def test_both_ways_give_the_same_bytes(tmp_path: Path, make: Callable[[], PreTrainedModel]) -> None:
    family(tmp_path, make)
    assert_same(
        tmp_path,
        [
            document(tmp_path, "task_arithmetic", 0.2),
            document(tmp_path, "task_arithmetic", FILTERED),
            document(tmp_path, "ties", 0.8),
            document(tmp_path, "linear", 0.8, dtype="bfloat16", parameters={"weight": 1}),
        ],
    )  # fmt: skip


def test_random_masks_are_drawn_alike(tmp_path: Path) -> None:
    family(tmp_path, untied)
    weights = (0.2, 0.9)
    documents = [document(tmp_path, "dare_ties", weight) for weight in weights]
    assert_same(tmp_path, documents, seed=3)


def test_slices_and_other_tokens(tmp_path: Path) -> None:
    family(tmp_path, untied)
    slices = [
        document(tmp_path, "linear", 1, models=None, slices=[
            {"sources": [{"model": str(tmp_path / name), "layer_range": layers,
                          "parameters": {"weight": share}}
                         for name, share in (("a", weight), ("base", 1))]}
            for layers in ([0, 2], [1, 2])
        ]) for weight in (0.3, 0.6)
    ]  # fmt: skip
    for one in slices:
        del one["models"]
    assert_same(tmp_path, slices)
    write_with_another_token(tmp_path / "tokens")
    assert_same(
        tmp_path,
        [
            {
                "merge_method": "linear",
                "models": [
                    {"model": str(tmp_path / "tokens" / "base"), "parameters": {"weight": weight}},
                    {"model": str(tmp_path / "tokens" / "a"), "parameters": {"weight": 1}},
                ],
                "tokenizer": {"source": "union"},
                "dtype": "float32",
            }
            for weight in (0.3, 0.6)
        ],
    )


def test_aim_in_memory(tmp_path: Path, measure: Callable[..., Path]) -> None:
    family(tmp_path, tied)
    measure(tmp_path / "base", tmp_path / "stats")
    stats = str(tmp_path / "stats")
    documents = [
        document(tmp_path, "aim_ties", 1, parameters={"omega": omega, "activation_stats": stats})
        for omega in (0.4, 0.1)
    ]
    assert_same(tmp_path, documents)


def test_inputs_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family(tmp_path, untied)
    shop = workshop(tmp_path / "one", in_memory=True)
    documents = [document(tmp_path, "task_arithmetic", weight) for weight in (0.1, 0.2, 0.3)]
    for one in documents[:2]:
        everything(shop, one)
    assert {type(one) for one in LoaderCache.loaders.values()} == {KeptTensors}
    for name in ("base", "a", "b"):
        (tmp_path / name / "model.safetensors").unlink()
    third = everything(shop, documents[2])
    family(tmp_path, untied)
    LoaderCache.loaders.clear()
    expected = everything(workshop(tmp_path / "two", in_memory=False), documents[2])
    assert all(torch.equal(third[name], expected[name]) for name in third)


def test_nothing_stays_on_the_disk_unless_asked(tmp_path: Path) -> None:
    family(tmp_path, untied)
    shop = workshop(tmp_path / "one", in_memory=True)
    shop.model(document(tmp_path, "task_arithmetic", 0.5), on_disk=False)
    assert not (tmp_path / "one").exists()
    shop.model(document(tmp_path, "task_arithmetic", 0.5), on_disk=True)
    assert (tmp_path / "one" / "config.json").is_file()


def test_a_merge_that_fails_is_one_line(tmp_path: Path) -> None:
    family(tmp_path, untied)
    shop = workshop(tmp_path / "one", in_memory=True)
    shop.model(document(tmp_path, "task_arithmetic", 0.5), on_disk=False)
    with pytest.raises(Failure, match="mergekit could not merge"):
        shop.model(document(tmp_path, "slerp", 0.5), on_disk=False)
