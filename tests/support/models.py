"""Tiny models that every test file shares."""

from __future__ import annotations

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 96


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
    vary_norms(model)
    return model


def vary_norms(model: PreTrainedModel) -> None:
    """Let the norms' weights differ from 1 and from each other, as in a trained model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)


def tiny_experts(seed: int, *, experts: int = 4, per_token: int = 2) -> Qwen3MoeForCausalLM:
    """Return a random mixture of experts with two layers."""
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=experts,
            num_experts_per_tok=per_token,
            decoder_sparse_step=1,
            max_position_embeddings=64,
        )
    )


def perturbed(model: PreTrainedModel, seed: int, scale: float = 0.02) -> PreTrainedModel:
    """Return a copy of ``model`` with noise on every parameter: a stand-in for a fine-tune."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return copy
