"""A transformers model as the parts of the compiled decoder. A module that may compute something else is refused.

What a block has is found from its modules: norms, one or several projections, an MLP or experts. What its forward pass
does with them cannot be seen there, so only classes are taken whose forward pass has been read (`COMPILED`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, SiLUActivation

from upq.kernels import Weight, compute
from upq.kernels.decoder import Activation, Block, Experts, Linear, Mlp, Norm, Parts, Rope
from upq.model.layout import layout_of
from upq.model.windows import window
from upq.nn.experts import PackedExperts
from upq.nn.kv import KvQuantiser
from upq.nn.packed import Factor, PackedEmbedding, PackedLinear, TiedHead


@dataclass(frozen=True, slots=True)
class Family:
    """What the classes of a family compute and their modules do not show."""

    block: str  # class of its blocks
    partial_rotary: bool = False  # positions may turn a part of each head
    logits_divisor: str | None = None  # its key in the configuration
    without: tuple[str, ...] = ()  # keys of what is not compiled


_GEMMA3 = Family("Gemma3DecoderLayer", without=("final_logit_softcapping",))

# By transformers' `model_type`: classes of transformers 5.23 whose forward passes have been read.
COMPILED: Mapping[str, Family] = {
    "gemma3": _GEMMA3,  # with its tower, whose text alone is the same
    "gemma3_text": _GEMMA3,
    "granite": Family("GraniteDecoderLayer", logits_divisor="logits_scaling"),
    "llama": Family("LlamaDecoderLayer"),
    "mistral": Family("MistralDecoderLayer"),
    "olmo2": Family("Olmo2DecoderLayer"),
    "phi3": Family("Phi3DecoderLayer", partial_rotary=True),
    "qwen2": Family("Qwen2DecoderLayer"),
    "qwen3": Family("Qwen3DecoderLayer"),
    "qwen3_moe": Family("Qwen3MoeDecoderLayer"),
    "smollm3": Family("SmolLM3DecoderLayer"),
}
# Rotary positions whose frequencies do not change with the length of the text.
_ROTARY = ("default", "linear", "llama3", "yarn")
_ACTIVATIONS: Mapping[type, Activation] = {nn.SiLU: "silu", SiLUActivation: "silu", GELUTanh: "gelu_tanh"}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Unsuitable(Exception):
    """Why the compiled decoder leaves something to transformers, in a few words."""


def parts(model: PreTrainedModel, *, dense: bool = False) -> Parts:
    """The parts as they are now. `dense`: also of a model without packed linears. Raises Unsuitable."""
    family = COMPILED.get(model.config.model_type)
    if family is None:
        raise Unsuitable(f"the family {model.config.model_type} is not compiled")
    config: Any = model.config.get_text_config(decoder=True)
    _check_state(model)
    for key in family.without:
        if getattr(config, key) is not None:
            raise Unsuitable(f"{key} is not compiled")
    layout = layout_of(model)
    decoder: Any = model.get_submodule(layout.decoder)
    _check_children(decoder, {"embed_tokens", "layers", "norm", "rotary_emb"})
    layers = decoder.layers[: config.num_hidden_layers]
    if not dense and not any(type(module) in (PackedLinear, PackedExperts) for module in layers.modules()):
        raise Unsuitable("its linears are not packed")
    head_dim = layers[0].self_attn.head_dim
    ropes = _ropes(decoder.rotary_emb, None if family.partial_rotary else head_dim)
    table, factor = _embedding(model.get_submodule(layout.embedding))
    return Parts(
        embedding=table,
        embedding_scale=factor * float(getattr(decoder, "embedding_multiplier", 1.0)),
        blocks=tuple(_block(layer, config, family, list(ropes)) for layer in layers),
        norm=_norm(decoder.norm),
        head=_linear(model.get_submodule(layout.head)),
        logits_divisor=float(getattr(config, family.logits_divisor)) if family.logits_divisor else 1.0,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        ropes=tuple(ropes.values()),
    )


def _check_state(model: PreTrainedModel) -> None:
    """Raise for everything that makes transformers' own forward pass compute something else."""
    if model.device.type != "cpu":
        raise Unsuitable(f"the model is on {model.device.type}")
    if model.dtype not in _DTYPES:
        raise Unsuitable(f"the model is in {model.dtype}")
    if model.training:
        raise Unsuitable("the model is in training mode")
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation not in ("eager", "sdpa"):
        raise Unsuitable(f"attention by {config._attn_implementation}")
    for name, module in model.named_modules():
        if isinstance(module, KvQuantiser):
            raise Unsuitable(f"its keys and values are {module.scheme}")
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise Unsuitable(f"{name or 'the model'} has a hook")


def _check_children(module: nn.Module, known: set[str]) -> None:
    for name, child in module.named_children():
        if name not in known and type(child) is not nn.Dropout:
            raise Unsuitable(f"{type(module).__name__} has a part called {name}")


def _ropes(rotary: Any, whole: int | None) -> dict[str | None, Rope]:
    """Tables of positions, by type of block where these have their own; of `whole` heads, if that is not None."""
    own = isinstance(rotary.rope_type, dict)
    found: dict[str | None, Rope] = {}
    for kind, rope_type in (rotary.rope_type if own else {None: rotary.rope_type}).items():
        prefix = f"{kind}_" if own else ""
        frequencies = getattr(rotary, f"{prefix}inv_freq")
        if rope_type not in _ROTARY:
            raise Unsuitable(f"rotary positions of the type {rope_type}")
        if whole is not None and 2 * len(frequencies) != whole:
            raise Unsuitable("rotary positions on a part of the head")
        found[kind] = Rope(frequencies, getattr(rotary, f"{prefix}attention_scaling"))
    return found


def _block(layer: Any, config: Any, family: Family, ropes: list[str | None]) -> Block:
    """`ropes`: the types of block with a table of positions each, or None alone: one table for all."""
    if type(layer).__name__ != family.block:
        raise Unsuitable(f"a block of the type {type(layer).__name__}")
    _check_children(layer, {"self_attn", "mlp", *_NORMS})
    attention = layer.self_attn
    _check_children(attention, {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"})
    if not attention.is_causal:
        raise Unsuitable("attention in both directions")
    kind = None if ropes == [None] else config.layer_types[attention.layer_idx]
    return Block(
        **_norms(layer),
        of_queries=_norm_of(attention, "q_norm"),
        of_keys=_norm_of(attention, "k_norm"),
        qkv=_fused_or_not(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj")),
        o=_linear(attention.o_proj),
        mlp=_experts(layer.mlp) if hasattr(layer.mlp, "experts") else _mlp(layer.mlp),
        activation=_activation(getattr(layer.mlp, "experts", layer.mlp)),
        scaling=attention.scaling,
        rope=ropes.index(kind) if getattr(attention, "use_rope", True) else None,
        window=window(config, attention.layer_idx),
        residual=float(getattr(layer, "residual_multiplier", 1.0)),
    )


_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _norms(layer: nn.Module) -> dict[str, Norm | None]:
    """Those of a block by their place. `post_attention_layernorm` is the MLP's in blocks without norms behind it."""
    first, second, third, last = (_norm_of(layer, name) for name in _NORMS)
    if last is None:
        if first is None or second is None or third is not None:
            raise Unsuitable(f"the norms of {type(layer).__name__}")
        return {"before_attention": first, "before_mlp": second}
    return {"before_attention": first, "after_attention": second, "before_mlp": third, "after_mlp": last}


def _norm_of(module: nn.Module, name: str) -> Norm | None:
    return _norm(getattr(module, name)) if hasattr(module, name) else None


def _norm(module: Any) -> Norm:
    if [name for name, _ in module.named_parameters()] == ["weight"]:
        if type(module).__name__ == "Gemma3RMSNorm":
            return Norm(module.weight, module.eps, offset=1.0)
        if hasattr(module, "variance_epsilon"):
            return Norm(module.weight, module.variance_epsilon)
    raise Unsuitable(f"the norm {type(module).__name__}")


def _mlp(module: Any) -> Mlp:
    _check_children(module, {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"})
    return Mlp(_fused_or_not(module, "gate_up_proj", ("gate_proj", "up_proj")), _linear(module.down_proj))


def _experts(module: Any) -> Experts:
    """Qwen3-MoE's: softmax over all experts, then the largest shares."""
    _check_children(module, {"experts", "gate"})
    _check_children(module.experts, {"gate_up_proj", "down_proj", "act_fn"})
    router, gate_up, down = module.gate, module.experts.gate_up_proj, module.experts.down_proj
    if type(router).__name__ != "Qwen3MoeTopKRouter" or type(module.experts).__name__ != "Qwen3MoeExperts":
        raise Unsuitable(f"experts of the type {type(module.experts).__name__}")
    return Experts(
        router_EH=router.weight,
        gate_up=_of_each(gate_up),
        down=_of_each(down),
        chosen=router.top_k,
        normalised=bool(router.norm_topk_prob),
    )


def _of_each(experts: Any) -> tuple[Weight | torch.Tensor, ...]:
    if type(experts) is PackedExperts:
        return tuple(_compiled(weight) for weight in experts.kernel_weights())
    if type(experts) is nn.Parameter:
        return experts.unbind()
    raise Unsuitable(f"experts of the type {type(experts).__name__}")


def _activation(module: Any) -> Activation:
    function = module.act_fn if hasattr(module, "act_fn") else module.activation_fn
    if type(function) not in _ACTIVATIONS:
        raise Unsuitable(f"the activation {type(function).__name__}")
    return _ACTIVATIONS[type(function)]


def _fused_or_not(module: nn.Module, fused: str, apart: tuple[str, ...]) -> tuple[Linear, ...]:
    return tuple(_linear(getattr(module, name)) for name in ((fused,) if hasattr(module, fused) else apart))


def _compiled(weight: Weight) -> Weight:
    if not weight.compiles_on("cpu"):
        raise Unsuitable("levels that are no small integers on one step")
    return weight


# Types are compared exactly: a subclass may compute something else.
def _linear(module: nn.Module) -> Linear:
    if type(module) is PackedLinear:
        if module.input is not None and not (module.input.scheme.of_kernel and compute() == "w2a8"):
            raise Unsuitable(f"its activations are {module.input.scheme}, computed by {compute()}")
        return Linear(_compiled(module.kernel_weight()), module.bias)
    if type(module) is TiedHead:
        return Linear(_compiled(module.embedding.kernel_weight()))
    if type(module) is nn.Linear:
        return Linear(module.weight, module.bias)
    raise Unsuitable(f"a linear of the type {type(module).__name__}")


def _embedding(module: Any) -> tuple[Weight | torch.Tensor, float]:
    """The table, and the factor of its rows as the model's type has it."""
    if type(module) is PackedEmbedding:
        return _compiled(module.kernel_weight()), module.factor.of_dtype(module.like.dtype)
    known = type(module) is nn.Embedding or type(module).__name__ == "Gemma3TextScaledWordEmbedding"
    if known and module.max_norm is None:
        return module.weight, Factor.of(module).of_dtype(module.weight.dtype)
    raise Unsuitable(f"an embedding of the type {type(module).__name__}")
