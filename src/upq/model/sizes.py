"""The sizes of a model that closed forms of memory and work read.

What a block keeps for its backward pass and computes is measured on one real block (`probe`).

Shape suffixes: B = rows, T = tokens of a row, H = hidden size, O = out, I = in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from upq.core.scheme import QuantScheme
from upq.model.cache import cache_name
from upq.model.layout import block_list
from upq.model.matrices import Matrix
from upq.model.source import Source
from upq.model.tables import Table, put_table
from upq.model.walker import hidden_first, only_block

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
    """What closed forms read of a model. Weights are counted, not their bytes.

    Where blocks differ, what is said of a block is said of the largest.
    """

    family: str  # transformers' model_type
    blocks: int
    hidden: int
    vocabulary: int
    shapes: tuple[tuple[int, int], ...]  # (E·O, I) of a block's weights that become codes
    widths: tuple[int, ...]  # what a token has of each one's output: O, or that of the experts that it reaches
    inputs: tuple[int, ...]  # I of each group of weights that read one input
    block: int  # weights of a block
    coded: int  # weights that become codes, of all blocks
    all: int  # weights of the model
    rest: int  # weights outside the blocks: embedding, final norm, head
    tied: bool  # the head is the embedding
    dtype: torch.dtype  # of the checkpoint
    fp32: Probe
    bf16: Probe

    @property
    def linears(self) -> int:
        return sum(o * i for o, i in self.shapes)

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def widest(self) -> int:
        """The most outputs of a product: the width of the MLP."""
        return max(self.widths)

    @property
    def largest(self) -> int:
        """Weights of the largest matrix."""
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
    source = Source.without_files(config)
    model = source.empty()
    counts = [sum(p.numel() for p in block.parameters()) for block in block_list(model, source.layout)]
    at = counts.index(max(counts))
    matrices, reached = source.matrices(at), _reached(source.text)
    in_all = sum(p.numel() for p in model.parameters())
    tied = f"{source.layout.head}.weight" in model.all_tied_weights_keys
    # The embedding, counted twice without memory.
    head = source.text.vocab_size * source.text.hidden_size if tied else 0
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    (fp32, groups), (bf16, _) = (_probe(source, at, bf16=precision) for precision in (False, True))
    return Sizes(
        family=config.model_type,
        blocks=len(source),
        hidden=source.text.hidden_size,
        vocabulary=source.text.vocab_size,
        shapes=tuple(matrix.shape for matrix in matrices),
        widths=tuple(m.outputs * (min(reached, m.experts) if m.experts else 1) for m in matrices),
        inputs=groups,
        block=counts[at],
        coded=sum(m.rows * m.inputs for index in range(len(source)) for m in source.matrices(index)),
        all=in_all - head,
        rest=in_all - head - sum(counts),
        tied=tied,
        dtype=own,
        fp32=fp32,
        bf16=bf16,
    )


def _reached(text: PretrainedConfig) -> int:
    """How many experts a token reaches: transformers has a few names for it."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    return next((found for name in names if isinstance(found := getattr(text, name, None), int)), 1)


def _probe(source: Source, at: int, *, bf16: bool) -> tuple[Probe, tuple[int, ...]]:
    """Block `at` of the training's student, run on short rows of real tensors, all but the products with its weights.

    A product of a 70B's block would take a minute and 3 GB. What it keeps is known: its input, as it came
    (upq.nn.trained), and its flops are those of its shape. Also gives I of each group of weights that read one input.
    """
    model, reached = source.empty(), _reached(source.text)
    block, dtype = block_list(model, source.layout)[at], torch.bfloat16 if bf16 else torch.float32
    products, inputs = 0, dict[str, tuple[int, int]]()
    for matrix in source.matrices(at):
        times = min(reached, matrix.experts) if matrix.experts else 1
        products += 2 * matrix.outputs * matrix.inputs * times
        if not matrix.experts:
            block.set_submodule(matrix.name, _Unmultiplied(matrix, dtype, inputs))
    of_experts = dict[str, list[Matrix]]()
    for matrix in source.matrices(at):
        if matrix.experts:
            of_experts.setdefault(matrix.module, []).append(matrix)
    for path, tensors_of in of_experts.items():
        experts = block.get_submodule(path)
        # Of each token and expert: what the first weight reads and writes, and what the second reads.
        widths = reached * sum(m.outputs + m.inputs for m in tensors_of)
        experts.forward = partial(_unmultiplied_experts, width=widths, dtype=dtype)
        experts._parameters.clear()
    _make_real(model, source, block)
    (short, kept, flops, cache), (long, more, flops_more, _) = (
        _run(model, source, at, tokens, bf16) for tokens in _TOKENS
    )
    kept_square, flops_square = (
        (b / long - a / short) / (long - short) for a, b in ((kept, more), (flops, flops_more))
    )
    linear_flops = flops / short - flops_square * short + products
    found = Probe(kept / short - kept_square * short, kept_square, linear_flops, flops_square, cache)
    groups = (*dict(inputs.values()).values(), *(m.inputs for m in source.matrices(at) if m.experts))
    return found, groups


def _no_rows(_ids: Tensor) -> Tensor:
    raise AssertionError("a table of zeros is not read")


def _make_real(model: PreTrainedModel, source: Source, block: nn.Module) -> None:
    """Zeros for every weight that a forward pass of the decoder reads, but for those of other blocks and of tables."""
    decoder = model.get_submodule(source.layout.decoder)
    others = {id(m) for each in block_list(model, source.layout) if each is not block for m in each.modules()}
    for module in decoder.modules():
        if id(module) in others:
            continue
        if isinstance(module, nn.Embedding):
            table = Table(tuple(module.weight.shape), torch.float32, torch.device("cpu"), _no_rows)
            table.mode = "zeros"
            put_table(module, table)
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = nn.Parameter(torch.zeros(parameter.shape))


class _Unmultiplied(nn.Module):
    """Keeps for the backward pass what a TrainedLinear keeps, and gives zeros of its output's shape and type."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype, inputs: dict[str, tuple[int, int]]) -> None:
        """`inputs` gets by name the memory of the tensor that is read first, which the backward pass holds, and I."""
        super().__init__()
        self._matrix, self._dtype, self._inputs = matrix, dtype, inputs

    def forward(self, x: Tensor) -> Tensor:
        self._inputs.setdefault(self._matrix.name, (x.data_ptr(), self._matrix.inputs))
        y: Tensor = _Keep.apply(x, self._matrix.outputs, self._dtype)  # type: ignore[no-untyped-call]
        return y


def _unmultiplied_experts(x: Tensor, *_: Any, width: int, dtype: torch.dtype, **__: Any) -> Tensor:
    """Zeros, as an experts module gives them, with `width` elements a token kept for its backward pass."""
    kept: Tensor = _Keep.apply(x, width, dtype)  # type: ignore[no-untyped-call]
    return x + _Keep.apply(kept, 1, dtype).to(x.dtype) * 0  # type: ignore[no-untyped-call, no-any-return]


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, outputs: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_zeros(*x.shape[:-1], outputs, dtype=dtype)


def _run(model: PreTrainedModel, source: Source, at: int, tokens: int, bf16: bool) -> tuple[int, float, float, int]:
    """Tokens, bytes kept for backward, flops, elements of the key-value cache for a token."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters() if not p.is_meta}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other gets its address
        return tensor

    hooks, counter = (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        FlopCounterMode(display=False, custom_mapping=_ATTENTION),
    )

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        hidden_BTH, args, kwargs = hidden_first(args, kwargs)
        hooks.__enter__()
        counter.__enter__()  # type: ignore[no-untyped-call]
        return (hidden_BTH.detach().requires_grad_(), *args), kwargs

    def leave(*_: Any) -> None:
        counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        hooks.__exit__()

    decoder: Any = model.get_submodule(source.layout.decoder)
    block = block_list(model, source.layout)[at]
    ids_1T = torch.zeros(1, tokens, dtype=torch.long)
    handles = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
    with only_block(model, source.layout, at), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        decoder(input_ids=ids_1T, use_cache=False)
    for handle in handles:
        handle.remove()
    elements = 0
    if name := cache_name(decoder.forward):
        cache = DynamicCache(config=source.text)
        with torch.no_grad(), only_block(model, source.layout, at):
            decoder(input_ids=ids_1T, **{name: cache}, use_cache=True)
        layer: Any = cache.layers[at]  # its class has keys and values where the block has attention
        parts = (getattr(layer, name, None) for name in ("keys", "values"))
        elements = sum(part.numel() for part in parts if isinstance(part, Tensor)) // tokens
    kept_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return tokens, kept_bytes, float(counter.get_total_flops()), elements


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# The CPU's attention is not in torch's registry.
_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
