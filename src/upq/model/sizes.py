"""The sizes of a model that closed forms of memory and work read.

What a block keeps for its backward pass and computes is measured on one real block (`probe`).

Shape suffixes: B = rows, T = tokens of a row, H = hidden size, O = out, I = in.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from upq.core.scheme import QuantScheme
from upq.model.loading import decoder_blocks, family

SMALL = 32 * 2**20  # glibc maps larger tensors by themselves and unmaps them at once (M_MMAP_THRESHOLD_MAX)
FP32 = 4  # bytes
_TOKENS = (16, 32)  # of the probe's rows: two lengths give the linear and the quadratic part


@dataclass(frozen=True, slots=True)
class Bytes:
    """Memory of tensors. `loose` is the part in tensors of up to SMALL bytes that come and go."""

    all: float = 0.0
    loose: float = 0.0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.all + other.all, self.loose + other.loose)

    def __mul__(self, times: float) -> Bytes:
        return Bytes(self.all * times, self.loose * times)


def tensors(count: float, size: float) -> Bytes:
    """`count` tensors of `size` bytes each that come and go."""
    return Bytes(count * size, count * size if size <= SMALL else 0.0)


def largest(*moments: Bytes) -> Bytes:
    """The peak over several moments. Loose memory of a lower one counts where its heap would exceed the peak."""
    return max(moments, key=lambda moment: moment.all + moment.loose)


@dataclass(frozen=True, slots=True)
class Probe:
    """One row of T tokens in one block: `linear`·T + `square`·T² bytes kept for backward, and flops of a forward pass.

    `cache` is what a token leaves in the key-value cache, in elements.
    """

    kept_linear: float
    kept_square: float
    flops_linear: float
    flops_square: float
    cache: int

    def kept(self, rows: int, tokens: int) -> float:
        return rows * (self.kept_linear * tokens + self.kept_square * tokens**2)

    def flops(self, rows: int, tokens: int) -> float:
        return rows * (self.flops_linear * tokens + self.flops_square * tokens**2)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What closed forms read of a model. Weights are counted, not their bytes."""

    blocks: int
    hidden: int
    vocabulary: int
    shapes: tuple[tuple[int, int], ...]  # (O, I) of a block's linears
    inputs: tuple[int, ...]  # I of each group of linears that read one input
    block: int  # weights of a block
    rest: int  # weights outside the blocks: embedding, final norm, head
    tied: bool  # the head is the embedding
    dtype: torch.dtype  # of the checkpoint
    fp32: Probe
    bf16: Probe

    @property
    def linears(self) -> int:
        return sum(o * i for o, i in self.shapes)

    @property
    def coded(self) -> int:
        return self.linears * self.blocks

    @property
    def all(self) -> int:
        return self.block * self.blocks + self.rest

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def widest(self) -> int:
        """The most outputs of a linear: the width of the MLP."""
        return max(o for o, _ in self.shapes)

    @property
    def largest(self) -> int:
        """Weights of the largest linear."""
        return max(o * i for o, i in self.shapes)

    def probe(self, *, bf16: bool) -> Probe:
        return self.bf16 if bf16 else self.fp32

    def groups(self, scheme: QuantScheme) -> int:
        """Grid parameters of a block, of each kind."""
        return sum(o * scheme.groups(i) for o, i in self.shapes)

    def solved(self, scheme: QuantScheme, *, latents: bool) -> float:
        """Bytes of a solved block: latents or packed codes, and grid parameters."""
        return self.linears * (FP32 if latents else scheme.bits / 8) + FP32 * self.groups(scheme)

    def read(self, rows: int, tokens: int, size: float = FP32) -> Bytes:
        """Hidden states of `rows`."""
        return tensors(1, size * rows * tokens * self.hidden)

    def matrices(self, size: float = FP32, copies: float = 1) -> Bytes:
        """A tensor of `size` bytes an element for each linear of a block, `copies` times."""
        return sum((tensors(copies, size * o * i) for o, i in self.shapes), Bytes())

    def forward(self, rows: int, tokens: int, size: float = FP32, *, wide: int = 3, residual: float = 0) -> Bytes:
        """A block's forward pass without gradients: residual and input, and `wide` tensors as wide as the MLP.

        `size`: bytes of an element; the residual stream may have another, `residual`.
        """
        states = tensors(2, (residual or size) * rows * tokens * self.hidden)
        return states + tensors(wide, size * rows * tokens * self.widest)


def sizes_of(config: PretrainedConfig) -> Sizes:
    """From the configuration. One block is run, on zeros: pages of zeros that are only read take no memory."""
    one, model = _of_depth(config, 1), _empty(config, 1)
    spec, block = family(config), decoder_blocks(model)[0]
    shapes = {name: _linear(block, name).weight.shape for name in spec.linears}
    in_block, in_all = (sum(p.numel() for p in module.parameters()) for module in (block, model))
    tied = f"{spec.head}.weight" in model.all_tied_weights_keys
    head = config.vocab_size * config.hidden_size if tied else 0  # the embedding, counted twice without memory
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return Sizes(
        blocks=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        shapes=tuple((o, i) for o, i in shapes.values()),
        inputs=tuple(shapes[group[0]][1] for group in spec.groups),
        block=in_block,
        rest=in_all - in_block - head,
        tied=tied,
        dtype=own,
        fp32=probe(one, bf16=False),
        bf16=probe(one, bf16=True),
    )


def probe(config: PretrainedConfig, *, bf16: bool) -> Probe:
    """One block of the training's student, run on short rows of real tensors, all but its linears' products.

    A product of a 70B's block would take a minute and 3 GB. What it keeps is known: its input, as it came
    (upq.nn.trained), and its flops are those of its shape.
    """
    model = _empty(config, 1, vocabulary=8)
    spec, block = family(config), decoder_blocks(model)[0]
    products = 0
    for name in spec.linears:
        linear = _linear(block, name)
        block.set_submodule(name, _Unmultiplied(linear, torch.bfloat16 if bf16 else torch.float32))
        products += 2 * linear.weight.numel()
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = nn.Parameter(torch.zeros(parameter.shape))
    (short, kept, flops, cache), (long, more, flops_more, _) = (_run(model, block, tokens, bf16) for tokens in _TOKENS)
    kept_square, flops_square = (
        (b / long - a / short) / (long - short) for a, b in ((kept, more), (flops, flops_more))
    )
    linear_flops = flops / short - flops_square * short + products
    return Probe(kept / short - kept_square * short, kept_square, linear_flops, flops_square, cache)


class _Unmultiplied(nn.Module):
    """Keeps for the backward pass what a TrainedLinear keeps, and gives zeros of its output's shape and type."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self._outputs, self._dtype = linear.out_features, dtype

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Keep.apply(x, self._outputs, self._dtype)  # type: ignore[no-untyped-call]
        return y


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, outputs: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_zeros(*x.shape[:-1], outputs, dtype=dtype)


def _run(model: PreTrainedModel, block: nn.Module, tokens: int, bf16: bool) -> tuple[int, float, float, int]:
    """Tokens, bytes kept for backward, flops, elements of the key-value cache for a token."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other gets its address
        return tensor

    hooks, counter = (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        FlopCounterMode(display=False, custom_mapping=_ATTENTION),
    )
    x_BTH = torch.zeros(1, tokens, model.config.hidden_size, requires_grad=True)

    def enter(*_: Any) -> None:
        hooks.__enter__()
        counter.__enter__()  # type: ignore[no-untyped-call]

    def leave(*_: Any) -> None:
        counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        hooks.__exit__()

    handles = [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model.get_submodule(family(model.config).decoder)(inputs_embeds=x_BTH, use_cache=False)
    for handle in handles:
        handle.remove()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.get_submodule(family(model.config).decoder)(inputs_embeds=x_BTH, past_key_values=cache, use_cache=True)
    layer: Any = cache.layers[0]  # its class has keys and values where the block has attention
    kept_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    elements = (layer.keys.numel() + layer.values.numel()) // tokens
    return tokens, kept_bytes, float(counter.get_total_flops()), elements


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# The CPU's attention is not in torch's registry.
_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def _linear(block: nn.Module, name: str) -> nn.Linear:
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _of_depth(config: PretrainedConfig, blocks: int) -> PretrainedConfig:
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = blocks
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:blocks]
    return shallow


def _empty(config: PretrainedConfig, blocks: int, *, vocabulary: int | None = None) -> PreTrainedModel:
    """The model without memory for its weights; with another `vocabulary` no token of it is special."""
    config = _of_depth(config, blocks)
    if vocabulary is not None:
        config.vocab_size, config.pad_token_id = vocabulary, None
    auto: Any = AutoModelForCausalLM  # untyped
    with init_empty_weights(include_buffers=False), no_init_weights():
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    model.eval()  # type: ignore[no-untyped-call]
    return model
