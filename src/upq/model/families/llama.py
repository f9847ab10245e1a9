"""Llama 1 to 3 and everything that took over its block: SmolLM 1 and 2, TinyLlama, Yi, DeepSeek-LLM."""

from upq.model.families._base import FAMILIES, ModelSpec

LLAMA = ModelSpec(
    groups=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    compiled_decoding=True,
)
FAMILIES.register("llama")(LLAMA)
