"""An encoder and a decoder read tokens of their own; samples are of those."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from mergekit_arm.data.corpus import read_corpus
from mergekit_arm.data.sample import TokenSample
from mergekit_arm.data.settings import DataSettings
from tests.support.equality import load_statistics
from tests.support.models import VOCABULARY

LENGTH = 32


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
        )
    ).eval()


ENCODER = "encoder.block.0.layer.0.SelfAttention.q"
DECODER = "decoder.block.0.layer.0.SelfAttention.q"
CROSS = "decoder.block.0.layer.1.EncDecAttention.k"


@pytest.mark.parametrize(("subspace_tokens", "skip_first"), [(60, 0), (10_000, 3), (60, 5)])
@pytest.mark.parametrize("rows", [12, 5])
def test_subspaces_see_the_sample_that_the_metadata_promise(
    subspace_tokens: int,
    skip_first: int,
    rows: int,
    token_file: Path,
    tmp_path: Path,
    measure: Callable[..., Path],
) -> None:
    """Against hooks on the model, and second moments in float64."""
    model = tiny_t5()
    model.save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"keep_sketch": True, "samples": rows, "batch_size": 2, "seed": 7}
    measure(
        tmp_path / "model",
        tmp_path / "s",
        subspace_tokens=subspace_tokens,
        skip_first=skip_first,
        **options,
    )
    metadata, tensors = load_statistics(tmp_path / "s")
    half = LENGTH // 2
    sample = TokenSample([half] * rows, subspace_tokens, seed=7, skip_first=skip_first)
    wanted = min(subspace_tokens, rows * (half - skip_first))
    moments = second_moments(model, token_file, sample, rows)
    for name in (ENCODER, DECODER, CROSS):
        site = metadata.weights[f"{name}.weight"].site
        assert int(tensors[f"{site}.subspace_tokens"]) == wanted, name
        found = tensors[f"{site}.sketch"].double().triu()
        torch.testing.assert_close(found, moments[name].triu(), rtol=1e-5, atol=1e-4)


def second_moments(
    model: nn.Module, data: Path, sample: TokenSample, rows: int
) -> dict[str, torch.Tensor]:
    """Pass the blocks one by one, as they were shuffled, and add up the sampled rows' XᵀX."""
    settings = DataSettings(datasets=(str(data),), samples=rows, seed=7)
    blocks = read_corpus(settings, None).blocks
    found = {name: torch.zeros(32, 32, dtype=torch.float64) for name in (ENCODER, DECODER, CROSS)}
    inputs: dict[str, torch.Tensor] = {}
    for name in found:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: inputs.__setitem__(name, args[0][0])  # type: ignore[misc]
        )
    for number, block in enumerate(blocks):
        half = len(block) // 2
        start = torch.cat([torch.zeros(1, dtype=torch.int64), block[half:-1]])
        with torch.inference_mode():
            model(input_ids=block[None, :half], decoder_input_ids=start[None])
        picked = sample.rows(number, 1)
        for name, x in inputs.items():
            x = (x if picked is None else x[picked]).double()
            found[name] += x.T @ x
    return found
