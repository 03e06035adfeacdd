"""Architectures that once could not be walked layer by layer, or held on to what they had seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from tests.architectures.zoo import ZOO, build

ARCHITECTURES = {architecture.model: architecture for architecture in ZOO}


def llama4_text() -> PreTrainedModel:
    """The language model alone, which brings the ids to the device of its embedding."""
    settings = ARCHITECTURES["Llama4ForConditionalGeneration"].settings["text_config"]
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**settings))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "Llama4ForCausalLM": llama4_text,
    **{
        name: lambda name=name: build(ARCHITECTURES[name])  # type: ignore[misc]
        for name in (
            "Gemma3ForConditionalGeneration",  # the window is shorter than the sequences
            "Qwen2_5_VLForConditionalGeneration",
        )
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_low_memory_measures_the_same_and_keeps_no_keys_and_values(
    name: str, measure: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def refuse(*_: Any, **__: Any) -> None:
        made.append("a cache")

    monkeypatch.setattr(DynamicCache, "update", refuse)
    monkeypatch.setattr(DynamicLayer, "update", refuse)
    MODELS[name]().save_pretrained(tmp_path / "model")
    outs: list[Path] = []
    for low_memory in (False, True):
        out = tmp_path / f"low-memory-{low_memory}"
        outs.append(measure(tmp_path / "model", out, low_memory=low_memory, batch_size=2))
    assert made == []
    whole, walked = ((out / "model.safetensors").read_bytes() for out in outs)
    assert whole == walked
