"""The models that studies start from."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tests.evidence.sizes import Size
from tests.real.smollm2 import smollm2
from tests.support.byte_tokenizer import byte_tokenizer


def base_folder(size: Size, work: Path) -> Path:
    """Return the directory of the size's base model; a tiny one is made in ``work``."""
    if size.base == "smollm2":
        return smollm2()
    if size.base != "tiny":
        return Path(snapshot_download(size.base))
    folder = work / "tiny-base"
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(0)
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"eos_token": "<|end|>"})
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
        tokenizer.save_pretrained(folder)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path, device: str) -> PreTrainedModel:
    """Load a model in float32, ready to be judged."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model's directory."""
    return AutoTokenizer.from_pretrained(folder)


@cache
def weights_digest(folder: Path) -> str:
    """Return a short name of a model's weights: lines of different bases can be told apart."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                found.update(block)
    return found.hexdigest()[:12]
