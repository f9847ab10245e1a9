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
from upq.kernels.decoder import Activation, Block, Linear, Mlp, Norm, Parts, Rope
from upq.model.layout import layout_of
from upq.model.windows import window
from upq.nn.packed import PackedEmbedding, PackedLinear, TiedHead


@dataclass(frozen=True, slots=True)
class Family:
    """What the classes of a family compute and their modules do not show."""

    block: str  # class of its blocks
    partial_rotary: bool = False  # positions may turn a part of each head
    logits_divisor: str | None = None  # its key in the configuration


# By transformers' `model_type`. Of 5.x, read part by part.
COMPILED: Mapping[str, Family] = {
    "granite": Family("GraniteDecoderLayer", logits_divisor="logits_scaling"),
    "llama": Family("LlamaDecoderLayer"),
    "mistral": Family("MistralDecoderLayer"),
    "olmo2": Family("Olmo2DecoderLayer"),
    "phi3": Family("Phi3DecoderLayer", partial_rotary=True),
    "qwen2": Family("Qwen2DecoderLayer"),
    "qwen3": Family("Qwen3DecoderLayer"),
    "smollm3": Family("SmolLM3DecoderLayer"),
}
# Rotary positions whose frequencies do not change with the length of the text.
_ROTARY = ("default", "linear", "llama3", "yarn")
_ACTIVATIONS: Mapping[type, Activation] = {nn.SiLU: "silu", SiLUActivation: "silu", GELUTanh: "gelu_tanh"}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Unsuitable(Exception):
    """Why the compiled decoder leaves something to transformers, in a few words."""


def parts(model: PreTrainedModel) -> Parts:
    """The parts as they are now. Raises Unsuitable."""
    config: Any = model.config
    family = COMPILED.get(config.model_type)
    if family is None:
        raise Unsuitable(f"the family {config.model_type} is not compiled")
    _check_state(model)
    layout = layout_of(model)
    decoder: Any = model.get_submodule(layout.decoder)
    _check_children(decoder, {"embed_tokens", "layers", "norm", "rotary_emb"})
    layers = decoder.layers[: config.num_hidden_layers]
    if not any(type(module) is PackedLinear for module in layers.modules()):
        raise Unsuitable("its linears are not packed")
    head_dim = layers[0].self_attn.head_dim
    ropes = _ropes(decoder.rotary_emb, None if family.partial_rotary else head_dim)
    return Parts(
        embedding=_embedding(model.get_submodule(layout.embedding)),
        embedding_scale=float(getattr(decoder, "embedding_multiplier", 1.0)),
        blocks=tuple(_block(layer, config, family) for layer in layers),
        norm=_norm(decoder.norm),
        head=_linear(model.get_submodule(layout.head)),
        logits_divisor=float(getattr(config, family.logits_divisor)) if family.logits_divisor else 1.0,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        ropes=ropes,
    )


def _check_state(model: PreTrainedModel) -> None:
    """Raise for everything that makes transformers' own forward pass compute something else."""
    if (how := compute()) == "reference":
        raise Unsuitable(f"the kernels are set to {how}")
    if model.device.type != "cpu":
        raise Unsuitable(f"the model is on {model.device.type}")
    if model.dtype not in _DTYPES:
        raise Unsuitable(f"the model is in {model.dtype}")
    if model.training:
        raise Unsuitable("the model is in training mode")
    if model.config._attn_implementation not in ("eager", "sdpa"):
        raise Unsuitable(f"attention by {model.config._attn_implementation}")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise Unsuitable(f"{name or 'the model'} has a hook")


def _check_children(module: nn.Module, known: set[str]) -> None:
    for name, child in module.named_children():
        if name not in known and type(child) is not nn.Dropout:
            raise Unsuitable(f"{type(module).__name__} has a part called {name}")


def _ropes(rotary: Any, whole: int | None) -> tuple[Rope, ...]:
    """Tables of positions; of `whole` heads, if that is not None."""
    if rotary.rope_type not in _ROTARY:
        raise Unsuitable(f"rotary positions of the type {rotary.rope_type}")
    if whole is not None and 2 * len(rotary.inv_freq) != whole:
        raise Unsuitable("rotary positions on a part of the head")
    return (Rope(rotary.inv_freq, rotary.attention_scaling),)


def _block(layer: Any, config: Any, family: Family) -> Block:
    if type(layer).__name__ != family.block:
        raise Unsuitable(f"a block of the type {type(layer).__name__}")
    _check_children(layer, {"self_attn", "mlp", *_NORMS})
    attention = layer.self_attn
    _check_children(attention, {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"})
    return Block(
        **_norms(layer),
        of_queries=_norm_of(attention, "q_norm"),
        of_keys=_norm_of(attention, "k_norm"),
        qkv=_fused_or_not(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj")),
        o=_linear(attention.o_proj),
        mlp=_mlp(layer.mlp),
        activation=_activation(layer.mlp),
        scaling=attention.scaling,
        rope=0 if getattr(attention, "use_rope", True) else None,
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
    if [name for name, _ in module.named_parameters()] != ["weight"] or not hasattr(module, "variance_epsilon"):
        raise Unsuitable(f"the norm {type(module).__name__}")
    return Norm(module.weight, module.variance_epsilon)


def _mlp(module: Any) -> Mlp:
    _check_children(module, {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"})
    return Mlp(_fused_or_not(module, "gate_up_proj", ("gate_proj", "up_proj")), _linear(module.down_proj))


def _activation(module: Any) -> Activation:
    function = module.act_fn if hasattr(module, "act_fn") else module.activation_fn
    if type(function) not in _ACTIVATIONS:
        raise Unsuitable(f"the activation {type(function).__name__}")
    return _ACTIVATIONS[type(function)]


def _fused_or_not(module: nn.Module, fused: str, apart: tuple[str, ...]) -> tuple[Linear, ...]:
    return tuple(_linear(getattr(module, name)) for name in ((fused,) if hasattr(module, fused) else apart))


# Types are compared exactly: a subclass may compute something else.
def _linear(module: nn.Module) -> Linear:
    if type(module) is PackedLinear:
        return Linear(module.kernel_weight(), module.bias)
    if type(module) is TiedHead:
        return Linear(module.embedding.kernel_weight())
    if type(module) is nn.Linear:
        return Linear(module.weight, module.bias)
    raise Unsuitable(f"a linear of the type {type(module).__name__}")


def _embedding(module: nn.Module) -> Weight | torch.Tensor:
    if type(module) is PackedEmbedding:
        return module.kernel_weight()
    if type(module) is nn.Embedding and module.max_norm is None:
        return module.weight
    raise Unsuitable(f"an embedding of the type {type(module).__name__}")
