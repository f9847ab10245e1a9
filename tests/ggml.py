"""How ggml rounds what goes into a product, by the type of the weight: the reference for llama.cpp's results.

Block types take inputs of their own (ggml-cpu.c, type_traits_cpu.vec_dot_type; ggml-quants.c, quantize_row_*_ref):
K and ternary blocks Q8_K, 256 integers to a float32 scale; blocks of 32 Q8_0, with a float16 scale; F16 and BF16 their
own type. F32 rounds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from gguf import GGUFReader
from torch import Tensor, nn
from transformers import PreTrainedModel

from upq.exports._llamacpp import LlamaCpp
from upq.nn.packed import PackedLinear


def q8_k(x: Tensor) -> Tensor:
    """The value of largest magnitude becomes -127; its own sign is in the scale."""
    blocks = x.float().unflatten(-1, (-1, 256))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(largest == 0, 0.0, -127 / largest)
    codes = (inverse * blocks).round().clamp(max=127)
    return torch.where(largest == 0, 0.0, codes / inverse).flatten(-2)


def q8_0(x: Tensor) -> Tensor:
    blocks = x.float().unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale == 0, 0.0, blocks / scale).round()
    return (codes * scale.half().float()).flatten(-2)


_INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("Q2_K", "Q4_K", "TQ2_0"), q8_k),
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), q8_0),
    "F16": lambda x: x.half().float(),
    "BF16": lambda x: x.bfloat16().float(),
}


@contextmanager
def rounded_inputs(model: PreTrainedModel, file: Path) -> Iterator[None]:
    """The products of `model` on inputs rounded as llama.cpp does for the weights of its GGUF `file`."""
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    layers: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    names = LlamaCpp(model.config).tensor_names([f"{name}.weight" for name in layers])
    kinds = {layer: types[names[f"{name}.weight"]] for name, layer in layers.items()}
    kinds[model.get_output_embeddings()] = types.get("output.weight", types["token_embd.weight"])
    hooks = [
        layer.register_forward_pre_hook(_rounding(_INPUTS[kind])) for layer, kind in kinds.items() if kind != "F32"
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounding(rounded: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    return lambda _, given: (rounded(given[0]),)
