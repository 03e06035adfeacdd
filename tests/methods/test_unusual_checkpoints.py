"""Checkpoints that hold more than the model loads, and pickled ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit import architecture
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from mergekit_arm.errors import InputError
from tests.methods.test_planning import arm, document, execute, plan, refuse
from tests.support.merges import config, weights
from tests.support.models import perturbed, tiny_llama

EXTRA = "model.layers.2."


def norms_of_one(model: LlamaForCausalLM) -> LlamaForCausalLM:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
    return model


@pytest.fixture(scope="module")
def predicting(tmp_path_factory: pytest.TempPathFactory, measure: Callable[..., Path]) -> Path:
    """A family with a third layer in the files, as for the prediction of several tokens.

    All norms are ones: their values tell no layer from another.
    """
    folder = tmp_path_factory.mktemp("predicting")
    base = norms_of_one(tiny_llama(0))
    for name, model in (("base", base), ("a", norms_of_one(perturbed(base, 1)))):
        model.save_pretrained(folder / name)
        file = folder / name / "model.safetensors"
        state = load_file(file)
        for key in [key for key in state if "layers.1." in key]:
            gap = 0 if "norm" in key else 0.1
            state[key.replace("layers.1.", "layers.2.")] = state[key] + gap
        save_file(state, file, metadata={"format": "pt"})
    measure(folder / "base", folder / "stats")
    return folder


@pytest.fixture(params=["by its definition", "inferred"])
def _architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """mergekit knows an architecture, or takes every tensor that the checkpoints hold."""
    if request.param == "inferred":
        monkeypatch.setattr(architecture, "NAME_TO_ARCH", {})


@pytest.mark.usefixtures("_architecture")
@pytest.mark.parametrize("method", ["aim", "arm"])
def test_a_layer_that_the_model_does_not_load(method: str, predicting: Path) -> None:
    """It is no layer that slices have renumbered, and the layers that are loaded merge."""
    found = arm(predicting, predicting / "stats") if method == "arm" else config(predicting)
    merged = dict(execute(plan(found, 2)))
    assert set(merged) == {name for name in weights(predicting / "a") if EXTRA not in name}


def consent(parameter: str, value: float, rest: float) -> list[dict[str, Any]]:
    return [{"filter": EXTRA, "value": value}, {"value": rest}]


def test_without_consent_it_is_named(predicting: Path) -> None:
    """mergekit leaves the layer out, unless slices ask for it; then it counts as unmeasured."""
    with pytest.raises(InputError) as error:
        plan(document(predicting, ((0, 3),)), 3)
    assert EXTRA in error.value.message
    assert "not a parameter of the model" in error.value.message
    parameters = {"activation_stats": str(predicting / "stats"), "omega": consent("omega", 1, 0.3)}
    merged = dict(execute(plan(document(predicting, ((0, 3),), parameters=parameters), 3)))
    other = weights(predicting / "a")
    extra = [name for name in merged if EXTRA in name]
    assert extra
    for name in extra:
        torch.testing.assert_close(merged[name], other[name])


def pickled(source: Path, target: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """Copy a model, with its weights in pytorch_model.bin."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    torch.save({n: change(n, x) for n, x in load_file(file).items()}, target / "pytorch_model.bin")
    file.unlink()
    return target


@pytest.mark.parametrize(
    ("method", "changed"),
    [(m, c) for m in ("aim", "arm") for c in ("embed_tokens", "lm_head", "layers.1.mlp.up_proj")]
    + [("aim", "norm")],
)
def test_a_pickled_base_of_other_values(
    method: str, changed: str, family: Path, tmp_path: Path
) -> None:
    base = pickled(
        family / "base", tmp_path / "base", lambda name, x: x + 1 if changed in name else x
    )
    found = arm(family, family / "stats") if method == "arm" else config(family)
    line = refuse(found | {"base_model": str(base)}, tmp_path)
    assert changed in line
    assert "another model or revision" in line


def test_a_pickled_base_is_merged_like_any_other(family: Path, tmp_path: Path) -> None:
    base = pickled(family / "base", tmp_path / "base", lambda _, x: x)
    found = config(family)
    wanted = dict(execute(plan(found, 2)))
    merged = dict(execute(plan(found | {"base_model": str(base)}, 2)))
    assert wanted.keys() == merged.keys()
    assert all(torch.equal(merged[name], wanted[name]) for name in wanted)
