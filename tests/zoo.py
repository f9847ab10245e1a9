"""Tiny random models of many families: what a family's configuration needs to be small."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from tiny import FAMILIES
from upq.model.loading import auto_class

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
SHARED_KV = {  # the last two blocks read keys and values that the first two have computed
    "head_dim": 8,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    **{name: {"head_dim": 8} for name in FAMILIES},
    "ministral3": {"head_dim": 8},
    "qwen3_moe": {"num_experts": 4, **MOE},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {"num_experts": 4, "shared_expert_intermediate_size": 16, **MOE, **DELTA},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "gemma4_text": SHARED_KV,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, **MOE},
    "minimax_m2": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**MOE, **LATENT},
    "olmo2": {},
    "olmo3": {},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "granite": {},
    "granitemoehybrid": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention"] * 2,
        **MAMBA,
    },
    "phi": {},
    "phi3": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32, "head_dim": 8, "mamba_n_heads": 4},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_d_state": 8,
        "num_mem_blocks": 1,
    },
}


def random_model(name: str, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**TINY, **MODELS[name], **overrides})
    model: PreTrainedModel = auto_class(config).from_config(config)
    return model.eval().float().requires_grad_(False)
