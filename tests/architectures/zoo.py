"""A tiny random model for every architecture file that mergekit ships, and some that it infers.

Small widths that all differ, a few layers, every special block present. Every weight is random,
norms included, so that no two layers look alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 96
IMAGE_TOKEN = 90

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """One model, the checkpoint it is published as, and what mergekit makes of it."""

    file: str
    """Name of mergekit's architecture file, without its suffix; empty where it infers."""
    model: str
    """Class name: the architecture in ``config.json``."""
    config: str
    settings: dict[str, Any]
    saved_as: str | None = None
    """Class that has the tensors which published checkpoints have, where ``model`` has fewer."""
    publish: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors
    """From the tensors that transformers saves to those of published checkpoints."""
    extra: Callable[[list[int]], dict[str, Any]] = lambda ids: {}
    """What the model is given beside the token ids: images, audio."""
    image: tuple[int, ...] = ()
    """Token ids that stand for the image in a row."""
    refused: str | None = None
    """Part of mergekit's own message, where it merges no such model with any method."""
    note: str = ""

    @property
    def id(self) -> str:
        return self.file or self.model


def text(*without: str, **settings: Any) -> dict[str, Any]:
    """Settings of a small decoder."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {key: value for key, value in common.items() if key not in without} | settings


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_BERT = text("num_key_value_heads")
_DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_QWEN_VISION = {
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN3_VISION = _QWEN_VISION | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1, 2],
}
_QWEN_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_IMAGE = (92, IMAGE_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN, 93)


def _qwen_image(ids: list[int]) -> dict[str, Any]:
    # 4 × 4 patches of 3 channels × 2 frames × 4 × 4 pixels; four of them make one token.
    return {
        "pixel_values": torch.randn(16, 96).tolist(),
        "image_grid_thw": [[1, 4, 4]],
        "mm_token_type_ids": [[int(token == IMAGE_TOKEN) for token in ids]],
    }


def _image(ids: list[int]) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 3, 16, 16).tolist()}


def _pixtral_image(ids: list[int]) -> dict[str, Any]:
    return _image(ids) | {"image_sizes": [[16, 16]]}


def _audio(ids: list[int]) -> dict[str, Any]:
    return {"input_features": torch.randn(1, 8, 32).tolist()}


def _renamed(*pairs: tuple[str, str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for name, tensor in tensors.items():
            for old, new in pairs:
                if name.startswith(old):
                    name = new + name.removeprefix(old)
                    break
            renamed[name] = tensor
        return renamed

    return rename


def _with_rotary_buffers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-NeoX as EleutherAI published it: causal masks and rotary frequencies stored too."""
    tensors = dict(tensors)
    for layer in range(2):
        attention = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{attention}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{attention}.rotary_emb.inv_freq"] = torch.tensor([1.0, 0.1])
    return tensors


ZOO = (
    Architecture(
        "afmoe_partial",
        "AfmoeForCausalLM",
        "AfmoeConfig",
        text(
            **_EXPERTS,
            num_dense_layers=1,
            num_hidden_layers=3,
            head_dim=8,
            num_shared_experts=1,
            n_group=1,
            topk_group=1,
            global_attn_every_n_layers=2,
        ),
    ),
    Architecture("apertus", "ApertusForCausalLM", "ApertusConfig", text()),
    Architecture("arcee", "ArceeForCausalLM", "ArceeConfig", text()),
    Architecture(
        "bert-masked-lm",
        "BertForMaskedLM",
        "BertConfig",
        _BERT,
        saved_as="BertForPreTraining",
        note="with the pooler that published checkpoints have, listed: the model has none",
    ),
    Architecture(
        "bert-sequence-classification", "BertForSequenceClassification", "BertConfig", _BERT
    ),
    Architecture("bert-sequence-classification", "BertForMultipleChoice", "BertConfig", _BERT),
    Architecture("bert-sequence-classification", "BertForTokenClassification", "BertConfig", _BERT),
    Architecture(
        "bert",
        "BertModel",
        "BertConfig",
        _BERT,
        refused='can only concatenate list (not "tuple") to list',
        note="mergekit adds a list to the tuple of aliases of an optional tensor",
    ),
    Architecture("cohere", "CohereForCausalLM", "CohereConfig", text(use_qk_norm=True)),
    Architecture(
        "cohere2",
        "Cohere2ForCausalLM",
        "Cohere2Config",
        text(layer_types=["sliding_attention", "full_attention"], sliding_window=16),
    ),
    Architecture("distilbert-masked-lm", "DistilBertForMaskedLM", "DistilBertConfig", _DISTILBERT),
    Architecture(
        "distilbert-sequence-classification",
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        _DISTILBERT,
    ),
    Architecture(
        "distilbert-token-classification",
        "DistilBertForTokenClassification",
        "DistilBertConfig",
        _DISTILBERT,
    ),
    Architecture(
        "distilbert",
        "DistilBertModel",
        "DistilBertConfig",
        _DISTILBERT,
        publish=_renamed(("", "distilbert.")),
        note="with the prefix that mergekit asks for",
    ),
    Architecture(
        "falcon",
        "FalconForCausalLM",
        "FalconConfig",
        text(
            "intermediate_size",
            new_decoder_architecture=True,
            num_kv_heads=2,
            tie_word_embeddings=False,
        ),
    ),
    Architecture("gemma", "GemmaForCausalLM", "GemmaConfig", text(head_dim=8)),
    Architecture(
        "gemma2", "Gemma2ForCausalLM", "Gemma2Config", text(head_dim=8, sliding_window=16)
    ),
    Architecture(
        "gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", text(head_dim=8, sliding_window=16)
    ),
    Architecture(
        "gemma3vl",
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": text(head_dim=8, sliding_window=16),
            "vision_config": _VISION | {"vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 92,
            "eoi_token_index": 93,
        },
        publish=_renamed(
            ("vision_tower.vision_model.", "vision_tower.vision_model."),
            ("vision_tower.", "vision_tower.vision_model."),
        ),
        extra=_image,
        image=_IMAGE,
    ),
    Architecture("glm4", "Glm4ForCausalLM", "Glm4Config", text(head_dim=8)),
    Architecture(
        "glm4moe",
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        text(
            head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            n_shared_experts=1,
            first_k_dense_replace=1,
            use_qk_norm=True,
            num_hidden_layers=3,
        ),
    ),
    Architecture(
        "gpt-neox",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        text("num_key_value_heads"),
        publish=_with_rotary_buffers,
    ),
    Architecture("gpt2", "GPT2LMHeadModel", "GPT2Config", _GPT2),
    Architecture(
        "gpt2-sequence-classification", "GPT2ForSequenceClassification", "GPT2Config", _GPT2
    ),
    Architecture("gptbigcode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT2),
    Architecture("granite", "GraniteForCausalLM", "GraniteConfig", text()),
    Architecture(
        "granite4moehybrid",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        text(
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=40,
            num_hidden_layers=3,
            layer_types=["mamba", "attention", "mamba"],
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_n_groups=1,
            mamba_expand=2,
            mamba_chunk_size=8,
        ),
    ),
    Architecture(
        "lfm2",
        "Lfm2ForCausalLM",
        "Lfm2Config",
        text(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    ),
    Architecture("llama", "LlamaForCausalLM", "LlamaConfig", text()),
    Architecture(
        "llama-sequence-classification", "LlamaForSequenceClassification", "LlamaConfig", text()
    ),
    Architecture(
        "llama4",
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        {
            "text_config": text(
                head_dim=8,
                intermediate_size=24,
                intermediate_size_mlp=48,
                num_local_experts=4,
                num_experts_per_tok=1,
                interleave_moe_layer_step=2,
                attention_chunk_size=16,
            ),
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "pixel_shuffle_ratio": 0.5,
            },
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 92,
            "eoi_token_index": 93,
        },
        extra=_image,
        image=_IMAGE,
    ),
    Architecture(
        "mamba",
        "MambaForCausalLM",
        "MambaConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "time_step_rank": 6,
            "pad_token_id": 0,
        },
    ),
    Architecture("mistral", "MistralForCausalLM", "MistralConfig", text(sliding_window=16)),
    Architecture(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": text(head_dim=8, model_type="mistral"),
            "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 8},
            "image_token_index": IMAGE_TOKEN,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
        },
        extra=_pixtral_image,
        image=_IMAGE,
    ),
    Architecture("mixtral", "MixtralForCausalLM", "MixtralConfig", text(num_local_experts=4)),
    Architecture("olmo2", "Olmo2ForCausalLM", "Olmo2Config", text()),
    Architecture("phi2", "PhiForCausalLM", "PhiConfig", text()),
    Architecture("phi3", "Phi3ForCausalLM", "Phi3Config", text()),
    Architecture("qwen2", "Qwen2ForCausalLM", "Qwen2Config", text()),
    Architecture(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": text(rope_parameters=_MROPE),
            "vision_config": _QWEN_VISION | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
            **_QWEN_TOKENS,
        },
        extra=_qwen_image,
        image=_IMAGE,
        refused="has no attribute num_hidden_layers",
        note="mergekit asks the configuration for num_hidden_layers, which transformers 5 keeps "
        "in text_config",
    ),
    Architecture(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": text(rope_parameters=_MROPE),
            "vision_config": _QWEN_VISION
            | {
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": 32,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            **_QWEN_TOKENS,
        },
        extra=_qwen_image,
        image=_IMAGE,
    ),
    Architecture("qwen3", "Qwen3ForCausalLM", "Qwen3Config", text(head_dim=8)),
    Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        text(**_EXPERTS, head_dim=8, decoder_sparse_step=1, mlp_only_layers=[]),
    ),
    Architecture(
        "qwen3_vl",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {
            "text_config": text(head_dim=8, rope_parameters=_MROPE, **_EXPERTS),
            "vision_config": _QWEN3_VISION,
            **_QWEN_TOKENS,
        },
        extra=_qwen_image,
        image=_IMAGE,
    ),
    Architecture(
        "qwen3_vl_dense",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": text(head_dim=8, rope_parameters=_MROPE),
            "vision_config": _QWEN3_VISION,
            **_QWEN_TOKENS,
        },
        extra=_qwen_image,
        image=_IMAGE,
    ),
    Architecture("roberta-masked-lm", "RobertaForMaskedLM", "RobertaConfig", _BERT),
    Architecture(
        "roberta-sequence-classification",
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _BERT,
    ),
    Architecture(
        "roberta-token-classification", "RobertaForTokenClassification", "RobertaConfig", _BERT
    ),
    Architecture(
        "roberta",
        "RobertaModel",
        "RobertaConfig",
        _BERT,
        publish=_renamed(("pooler.", "pooler."), ("", "roberta.")),
        note="with the prefix that mergekit asks for",
    ),
    Architecture("stablelm2", "StableLmForCausalLM", "StableLmConfig", text()),
    Architecture("starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config", text()),
    Architecture(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
        },
    ),
    Architecture(
        "whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        extra=_audio,
        refused="model.decoderembed_tokens.weight",
        note="mergekit's file lacks a dot, so it asks for model.decoderembed_tokens.weight",
    ),
    # Without a file, mergekit takes transformers' own names.
    Architecture(
        "",
        "GptOssForCausalLM",
        "GptOssConfig",
        text(head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    ),
    Architecture(
        "",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        text(**_EXPERTS, shared_expert_intermediate_size=40),
    ),
    Architecture("", "OlmoeForCausalLM", "OlmoeConfig", text(num_experts=4, num_experts_per_tok=2)),
    Architecture(
        "",
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "pad_token_id": 0,
        },
    ),
    Architecture(
        "",
        "FalconH1ForCausalLM",
        "FalconH1Config",
        text(
            head_dim=8,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_n_groups=1,
            mamba_chunk_size=8,
            mamba_rms_norm=True,
            tie_word_embeddings=False,
        ),
    ),
    Architecture(
        "",
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        text(
            **_EXPERTS,
            head_dim=8,
            shared_expert_intermediate_size=40,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    Architecture(
        "",
        "Zamba2ForCausalLM",
        "Zamba2Config",
        text(
            num_hidden_layers=3,
            layers_block_type=["mamba", "hybrid", "mamba"],
            mamba_d_state=8,
            mamba_ngroups=1,
            n_mamba_heads=8,
            mamba_headdim=8,
            chunk_size=8,
            num_mem_blocks=1,
            adapter_rank=4,
            num_key_value_heads=4,
        ),
    ),
    Architecture(
        "",
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
    ),
    Architecture("", "ModernBertForMaskedLM", "ModernBertConfig", text("num_key_value_heads")),
    Architecture("", "SmolLM3ForCausalLM", "SmolLM3Config", text()),
    Architecture("", "OPTForCausalLM", "OPTConfig", text(ffn_dim=48, word_embed_proj_dim=32)),
)

REMOTE = {
    "baichuan": "BaichuanForCausalLM",
    "chatglm": "ChatGLMModel",
    "exaone": "ExaoneForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "jais": "JAISLMHeadModel",
    "phi-1": "MixFormerSequentialForCausalLM",
    "phi2-old": "PhiForCausalLM",
    "phi3-small": "Phi3SmallForCausalLM",
    "qwen": "QWenLMHeadModel",
    "solar": "SolarForCausalLM",
    "stablelm": "StableLMEpochForCausalLM",
}
"""Files for models whose code transformers does not have: it comes with the checkpoint."""


def build(architecture: Architecture, seed: int = 0) -> PreTrainedModel:
    """Return the model with random weights."""
    torch.manual_seed(seed)
    config = getattr(transformers, architecture.config)(**architecture.settings)
    model: PreTrainedModel = getattr(transformers, architecture.saved_as or architecture.model)(
        config
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()
