"""Tiny random models of many families: what a family's configuration needs to be small."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES

from tiny import FAMILIES
from upq.model.loading import auto_class

# What a size is called, in any family. Those that a configuration class knows are set.
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "state_size": 8,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_inner": 48,
    "n_positions": 64,
    "rotary_dim": 4,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "d_model": 32,
    "n_layers": 4,
    "n_heads": 4,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_LATENT = {"num_key_value_heads": 4}
_HYBRID = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
# What a family needs beside its sizes.
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"layer_types": _HYBRID},
    "qwen3_5_moe_text": {"layer_types": _HYBRID},
    "qwen3_next": {"layer_types": _HYBRID},
    "gemma4_text": {  # the last two blocks read keys and values that the first two have computed
        "head_dim": 8,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma3n_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"), _LATENT
    ),
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, **_MAMBA},
    "bamba": {"attn_layer_indices": [1, 3], **_MAMBA},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 32, **_MAMBA, "mamba_n_heads": 4},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_d_state": 8,
        "num_mem_blocks": 1,
    },
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
# Models with a tower for images: the parts of their configuration.
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": "gemma3_text",
        "vision_config": {**_VISION, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "qwen3_5": {
        "text_config": "qwen3_5_text",
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "patch_size": 4,
            "spatial_merge_size": 2,
        },
    },
    "mistral3": {"text_config": "mistral", "vision_config": {**_VISION, "image_size": 28, "patch_size": 14}},
    "llava": {"text_config": "llama", "vision_config": {**_VISION, "image_size": 28, "patch_size": 14}},
}
# The families of people's models, and of each kind of mixer and experts some.
MODELS = (
    *FAMILIES,
    *("ministral3", "gemma", "gemma2", "gemma3_text", "gemma4_text", "phi", "phi3", "olmo2", "olmo3"),
    *("granite", "cohere", "cohere2", "glm", "glm4", "helium", "stablelm", "starcoder2", "exaone4", "ernie4_5"),
    *("arcee", "seed_oss", "apertus", "nemotron", "minicpm3", "gpt2", "gpt_neox", "gptj", "opt", "falcon", "bloom"),
    *("qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "glm4_moe", "minimax_m2", "minimax", "deepseek_v2"),
    *("deepseek_v3", "olmoe", "ernie4_5_moe", "phimoe", "granitemoe", "jetmoe", "llama4_text", "flex_olmo", "hy_v3"),
    *("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "lfm2", "lfm2_moe", "granitemoehybrid", "jamba", "bamba"),
    *("mamba", "mamba2", "falcon_mamba", "falcon_h1", "zamba2", "nemotron_h", "recurrent_gemma", "mimo_v2_flash"),
)

# Of each kind one: what CI sees. The rest is `make zoo`.
CORE = {
    *("llama", "gemma3_text", "gemma4_text", "phi3", "olmo2", "granite", "gpt2"),
    *("qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3"),
    *("qwen3_5_moe_text", "lfm2", "granitemoehybrid", "mamba2", "zamba2", "gemma3"),
}


def by_speed(names: Iterable[str]) -> list[Any]:
    """As parameters of a test: those that are not in the core are the zoo's."""
    return [name if name in CORE else pytest.param(name, marks=pytest.mark.zoo) for name in names]


def tiny_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """A configuration of four blocks of width 32."""
    cls = CONFIG_MAPPING[name]
    if name in WRAPPERS:
        parts = dict(WRAPPERS[name])
        text = tiny_config(parts.pop("text_config"), **overrides).to_dict()
        return cls(text_config=text, architectures=[IMAGES[name]], **parts)
    try:
        known = cls().to_dict()
    except Exception:
        known = SMALL
    sizes = {key: value for key, value in SMALL.items() if key in known}
    return cls(**{**sizes, **OTHERS.get(name, {}), **overrides})


def random_model(name: str, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(name, **overrides)
    model: PreTrainedModel = auto_class(config).from_config(config)
    return model.eval().float().requires_grad_(False)
