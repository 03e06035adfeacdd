"""Tiny models and data that every test file shares."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mergekit_arm.calibration.run import CalibrationOptions, calibrate

VOCABULARY = 96

# Test processes share the cores. Two that each use them all spend most of their time waiting for
# each other; commands that tests start inherit the variable.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_THREADS = max(1, (os.cpu_count() or 1) // _WORKERS)
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", str(_THREADS))))


def tiny_llama(seed: int, *, layers: int = 2, tied: bool = False) -> LlamaForCausalLM:
    """Return a random Llama of a few thousand parameters whose layers all differ."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def perturbed(model: PreTrainedModel, seed: int, scale: float = 0.02) -> PreTrainedModel:
    """Return a copy of ``model`` with noise on every parameter: a stand-in for a fine-tune."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return copy


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of 32 random token ids."""
    path = tmp_path_factory.mktemp("data") / "tokens.jsonl"
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(VOCABULARY, (12, 32), generator=generator).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def measure(token_file: Path) -> Callable[..., Path]:
    """Return a function that calibrates a saved model on ``token_file``."""

    def run(model: Path, out: Path, **options: object) -> Path:
        calibrate(
            CalibrationOptions(model=str(model), out=str(out), dataset=str(token_file), **options)  # type: ignore[arg-type]
        )
        return out

    return run


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory, measure: Callable[..., Path]) -> Path:
    """A directory with base, two fine-tunes ``a`` and ``b``, and the base's ``stats``."""
    folder = tmp_path_factory.mktemp("family")
    base = tiny_llama(0)
    base.save_pretrained(folder / "base")
    perturbed(base, 1).save_pretrained(folder / "a")
    perturbed(base, 2).save_pretrained(folder / "b")
    measure(folder / "base", folder / "stats")
    return folder
