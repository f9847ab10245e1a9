"""A transformers model as the parts of the compiled decoder. A module that may compute something else is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from upq.kernels import Weight, compute
from upq.kernels.decoder import Block, Linear, Norm, Parts
from upq.model.layout import layout_of
from upq.model.windows import window
from upq.nn.packed import PackedEmbedding, PackedLinear, TiedHead

_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# transformers' `model_type`: their block is Llama's, with no more than what is looked at here.
LLAMA_BLOCKS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# Rotary positions whose frequencies do not change with the length of the text.
_ROTARY = ("default", "linear", "llama3", "yarn")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Unsuitable(Exception):
    """Why the compiled decoder leaves something to transformers, in a few words."""


def parts(model: PreTrainedModel) -> Parts:
    """The parts as they are now. Raises Unsuitable."""
    config = model.config
    if config.model_type not in LLAMA_BLOCKS:
        raise Unsuitable(f"the family {config.model_type} is not compiled")
    _check_state(model)
    layout = layout_of(model)
    decoder: Any = model.get_submodule(layout.decoder)
    _check_children(decoder, {"embed_tokens", "layers", "norm", "rotary_emb"})
    layers = decoder.layers[: config.num_hidden_layers]
    if not any(type(layer.get_submodule(path)) is PackedLinear for layer in layers for path in _LINEARS.values()):
        raise Unsuitable("its linears are not packed")
    rotary, attention = decoder.rotary_emb, layers[0].self_attn
    if rotary.rope_type not in _ROTARY:
        raise Unsuitable(f"rotary positions of the type {rotary.rope_type}")
    if 2 * len(rotary.inv_freq) != attention.head_dim:
        raise Unsuitable("rotary positions on a part of the head")
    return Parts(
        embedding=_embedding(model.get_submodule(layout.embedding)),
        blocks=tuple(_block(layer, config) for layer in layers),
        norm=_norm(decoder.norm),
        head=_linear(model.get_submodule(layout.head)),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        scaling=attention.scaling,
        frequencies=rotary.inv_freq,
        rotary_scaling=rotary.attention_scaling,
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
    for name, _ in module.named_children():
        if name not in known:
            raise Unsuitable(f"{type(module).__name__} has a part called {name}")


def _block(layer: Any, config: Any) -> Block:
    _check_children(layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
    _check_children(layer.self_attn, {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"})
    _check_children(layer.mlp, {"gate_proj", "up_proj", "down_proj", "act_fn"})
    if type(layer.mlp.act_fn) not in (nn.SiLU, SiLUActivation):
        raise Unsuitable(f"the activation {type(layer.mlp.act_fn).__name__}")
    attention = layer.self_attn
    return Block(
        before_attention=_norm(layer.input_layernorm),
        before_mlp=_norm(layer.post_attention_layernorm),
        of_queries=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        of_keys=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        rotary=bool(getattr(attention, "use_rope", True)),
        window=window(config, attention.layer_idx),
        **{name: _linear(layer.get_submodule(path)) for name, path in _LINEARS.items()},
    )


def _norm(module: Any) -> Norm:
    if [name for name, _ in module.named_parameters()] != ["weight"]:
        raise Unsuitable(f"the norm {type(module).__name__}")
    return Norm(module.weight, module.variance_epsilon)


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
