"""A family of models that several files merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.models import perturbed, tiny_llama


@pytest.fixture(scope="session")
def alike(tmp_path_factory: pytest.TempPathFactory, measure: Callable[..., Path]) -> Path:
    """A family whose norms are all ones: their values tell no layer from another.

    As in a model that was never trained.
    """
    folder = tmp_path_factory.mktemp("alike")
    base = tiny_llama(0)
    other = perturbed(base, 1)
    for layer in base.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            torch.nn.init.ones_(norm.weight)
    base.save_pretrained(folder / "base")
    other.save_pretrained(folder / "a")
    measure(folder / "base", folder / "stats")
    return folder
