"""Tiny models as llama.cpp reads them, written by its own package ``gguf``."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.models import vary_norms

_SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


def byte_llama(seed: int) -> LlamaForCausalLM:
    """Return a random Llama that reads bytes; its widths are what llama.cpp quantises."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**_SIZES, intermediate_size=96))
    vary_norms(model)
    return model


def byte_experts(seed: int) -> Qwen3MoeForCausalLM:
    """Return a random mixture of experts that reads bytes."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        **_SIZES, intermediate_size=96, moe_intermediate_size=32, num_experts=6,
        num_experts_per_tok=2, norm_topk_prob=True,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    vary_norms(model)
    return model


def write_model(model: PreTrainedModel, path: Path) -> None:
    """Write ``model`` and the tokenizer of bytes in float32, as llama.cpp's converter does."""
    config = model.config
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE}[
        config.model_type
    ]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if arch == gguf.MODEL_ARCH.QWEN3MOE:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    words = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(words, key=words.__getitem__))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges(["Ā ā"])  # llama.cpp wants one; no text has these two bytes
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in tensors(model).items():
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, name
        writer.add_tensor(found if "." in found[-7:] else f"{found}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Return the weights in llama.cpp's order of rows, with gate and up of experts apart."""
    found = {}
    for name, value in model.state_dict().items():
        tensor = value.numpy()
        if model.config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = len(tensor) // model.config.head_dim
            halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
            tensor = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
        if name.endswith("gate_up_proj"):
            for one, half in zip(("gate", "up"), np.split(tensor, 2, axis=1), strict=True):
                found[name.replace("gate_up", one)] = np.ascontiguousarray(half)
        else:
            found[name] = tensor
    return found
