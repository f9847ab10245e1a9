"""The forward pass of Llama's block and its kin, once, for engines that are given a graph: ONNX Runtime and others.

Written in some twenty operations that every graph format has. What it computes is what transformers' own model computes
(the tests of the formats compare logits, token by token with a cache too): embedding, blocks of attention and gated
MLP, norm, head. An engine with an attention or a cache of its own says so in a subclass of `Decoder`.

Shape suffixes: N = texts, T = tokens, P = tokens before them, S = P + T, H = heads, K = key-value heads, J = H/K,
D = head size, F = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from upq.core.errors import UPQError
from upq.core.scheme import QuantScheme
from upq.exports import dense
from upq.exports._source import Source, Weight
from upq.model.windows import window

V = TypeVar("V")


class Graph(Protocol[V]):
    """A graph under construction; V is the engine's handle of a value. All are float32 where nothing else is said."""

    def constant(self, value: Tensor) -> V: ...
    def vector(self, name: str) -> V:
        """A norm or a bias of the artefact."""
        ...

    def embed(self, ids_NT: V, name: str) -> V: ...
    def linear(self, x: V, name: str) -> V:
        """x · Wᵀ with the weight of this name."""
        ...

    def add(self, a: V, b: V) -> V: ...
    def multiply(self, a: V, b: V) -> V: ...
    def matmul(self, a: V, b: V) -> V: ...
    def rsqrt(self, x: V) -> V: ...
    def mean(self, x: V) -> V:
        """Over the last axis, which stays with length 1."""
        ...

    def sigmoid(self, x: V) -> V: ...
    def softmax(self, x: V) -> V: ...
    def cos(self, x: V) -> V: ...
    def sin(self, x: V) -> V: ...
    def to_float(self, x: V) -> V: ...
    def reshape(self, x: V, shape: Sequence[int]) -> V:
        """0 keeps a dimension, -1 is what remains."""
        ...

    def transpose(self, x: V, order: Sequence[int]) -> V: ...
    def concat(self, parts: Sequence[V], axis: int) -> V: ...
    def part(self, x: V, start: int, stop: int) -> V:
        """Of the last axis."""
        ...

    def running_count(self, mask_NS: V) -> V:
        """How many entries are 1 up to and with this one."""
        ...

    def bias_where(self, query: V, key: V, mask: V, window: int | None) -> V:
        """0 where a query may read a key and a large negative number elsewhere; positions are float32.

        It may where the mask is 1, the key is not later, and less than `window` earlier. Shapes broadcast.
        """
        ...


@dataclass(frozen=True, slots=True)
class Inputs(Generic[V]):
    ids_NT: V  # int64
    mask_NS: V  # int64: 1 for a token, 0 for padding
    positions_NT: V  # int64
    past: Sequence[tuple[V, V]]  # of each block: keys and values (N, K, P, D)


@dataclass(frozen=True, slots=True)
class Outputs(Generic[V]):
    logits_NTV: V
    present: Sequence[tuple[V, V]]  # as `past`, with the new tokens


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a configuration that the graph is made of."""

    heads: int
    kv_heads: int
    head_dim: int
    blocks: int
    eps: float

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        heads = config.num_attention_heads
        return cls(
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            blocks=config.num_hidden_layers,
            eps=config.rms_norm_eps,
        )


def dense_dtype(weight: Weight) -> torch.dtype:
    """Of a weight that is not packed: vectors are float32, which is what they are added to or multiplied with."""
    return dense.dense_dtype(weight) if len(weight.shape) == 2 else torch.float32


def code_bits(scheme: QuantScheme) -> int:
    """Bits of the codes in a graph, which has integers of 2, 4 and 8."""
    return next(bits for bits in (2, 4, 8) if bits >= scheme.bits)


# transformers' `model_type` of families whose block is Llama's: biases, norms on heads and the like aside.
LLAMA_BLOCKS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


def check(source: Source) -> None:
    """Refuse what the graph does not compute."""
    config = source.config
    if config.model_type not in LLAMA_BLOCKS:
        raise UPQError(f"{source.path}: the graph has Llama's block only, and {config.model_type} has another")
    if config.hidden_act != "silu":
        raise UPQError(f"{source.path}: the graph has silu, the model {config.hidden_act}")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        raise UPQError(f"{source.path}: the graph has no rotary scaling {rope['rope_type']!r}")
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UPQError(f"{source.path}: the graph has no rotary positions on a part of the head")


def frequencies(config: PretrainedConfig) -> tuple[Tensor, float]:
    """The angle of each feature at position 1, float32 (D,), and what cos and sin are multiplied with."""
    dim, rope = Shape.of(config).head_dim, config.rope_parameters
    kind, scaling = rope.get("rope_type", "default"), 1.0
    if kind == "default":
        frequency = rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / -dim)
    else:
        frequency, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return torch.cat([frequency, frequency]).float(), float(scaling)


def decoder(graph: Graph[V], source: Source, inputs: Inputs[V]) -> Outputs[V]:
    """The whole model, from ids to logits."""
    return Decoder(graph, source, inputs).run()


class Decoder(Generic[V]):
    def __init__(self, graph: Graph[V], source: Source, inputs: Inputs[V]) -> None:
        self.g, self.source, self.inputs = graph, source, inputs
        self.shape = Shape.of(source.config)
        self.rotation = self._rotation()
        self.masks: dict[int | None, V] = {}

    def run(self) -> Outputs[V]:
        layout, present = self.source.layout, []
        x = self.g.embed(self.inputs.ids_NT, f"{layout.embedding}.weight")
        for i in range(self.shape.blocks):
            path = f"{layout.blocks}.{i}"
            read = self.norm(x, f"{path}.input_layernorm")
            mixed, cache = self._attention(read, f"{path}.self_attn", i)
            x = self.g.add(x, mixed)
            present.append(cache)
            x = self.g.add(x, self._mlp(self.norm(x, f"{path}.post_attention_layernorm"), f"{path}.mlp"))
        head = layout.embedding if self.source.tied else layout.head
        x = self.norm(self.shown(x), f"{layout.decoder}.norm")
        return Outputs(self.g.linear(x, f"{head}.weight"), present)

    def shown(self, x: V) -> V:
        """Of the last block's output, the tokens whose logits are wanted: all."""
        return x

    def norm(self, x: V, path: str) -> V:
        g = self.g
        mean_square = g.mean(g.multiply(x, x))
        scale = g.rsqrt(g.add(mean_square, g.constant(torch.tensor([self.shape.eps]))))
        return g.multiply(g.multiply(x, scale), g.vector(f"{path}.weight"))

    def _linear(self, x: V, path: str) -> V:
        y = self.g.linear(x, f"{path}.weight")
        return self.g.add(y, self.g.vector(f"{path}.bias")) if f"{path}.bias" in self.source.weights else y

    def _mlp(self, x: V, path: str) -> V:
        gate = self._linear(x, f"{path}.gate_proj")
        gate = self.g.multiply(gate, self.g.sigmoid(gate))
        return self._linear(self.g.multiply(gate, self._linear(x, f"{path}.up_proj")), f"{path}.down_proj")

    def _attention(self, x: V, path: str, block: int) -> tuple[V, tuple[V, V]]:
        g, s = self.g, self.shape
        q_NKJTD = self._heads(x, path, "q", s.heads // s.kv_heads, block)
        k_NKTD = g.reshape(self._heads(x, path, "k", 1, block), (0, s.kv_heads, -1, s.head_dim))
        v_NKTD = g.reshape(self._split(x, path, "v", 1), (0, s.kv_heads, -1, s.head_dim))
        read_NTF, cache = self.attend(q_NKJTD, k_NKTD, v_NKTD, block)
        return self._linear(read_NTF, f"{path}.o_proj"), cache

    def attend(self, q_NKJTD: V, k_NKTD: V, v_NKTD: V, block: int) -> tuple[V, tuple[V, V]]:
        """What the queries of a block read, heads side by side, and its cache with the new keys and values."""
        g, s = self.g, self.shape
        k_NKSD, v_NKSD = self.grown(k_NKTD, v_NKTD, block)
        k_NK1DS = g.transpose(g.reshape(k_NKSD, (0, s.kv_heads, 1, -1, s.head_dim)), (0, 1, 2, 4, 3))
        scaled = g.multiply(q_NKJTD, g.constant(torch.tensor([s.head_dim**-0.5])))
        weights = g.softmax(g.add(g.matmul(scaled, k_NK1DS), self.mask(block)))
        read_NKJTD = g.matmul(weights, g.reshape(v_NKSD, (0, s.kv_heads, 1, -1, s.head_dim)))
        read_NTF = g.reshape(g.transpose(read_NKJTD, (0, 3, 1, 2, 4)), (0, 0, s.heads * s.head_dim))
        return read_NTF, (k_NKSD, v_NKSD)

    def grown(self, k_NKTD: V, v_NKTD: V, block: int) -> tuple[V, V]:
        """Old and new keys and values of a block."""
        past = self.inputs.past[block]
        return self.g.concat((past[0], k_NKTD), 2), self.g.concat((past[1], v_NKTD), 2)

    def _split(self, x: V, path: str, kind: str, group: int) -> V:
        """Queries, keys or values as (N, K, group, T, D), normed where the family does that."""
        g, s = self.g, self.shape
        y_NTKJD = g.reshape(self._linear(x, f"{path}.{kind}_proj"), (0, 0, s.kv_heads, group, s.head_dim))
        if f"{path}.{kind}_norm.weight" in self.source.weights:
            y_NTKJD = self.norm(y_NTKJD, f"{path}.{kind}_norm")
        return g.transpose(y_NTKJD, (0, 2, 3, 1, 4))

    def _heads(self, x: V, path: str, kind: str, group: int, block: int) -> V:
        """Queries or keys, turned by their positions where this block has them."""
        g, half = self.g, self.shape.head_dim // 2
        y = self._split(x, path, kind, group)
        layers = getattr(self.source.config, "no_rope_layers", None)
        if layers is not None and not layers[block]:
            return y
        cos, sin = self.rotation
        low, high = g.part(y, 0, half), g.part(y, half, 2 * half)
        minus = g.constant(torch.tensor([-1.0]))
        turned = g.concat((g.multiply(high, minus), low), 4)
        return g.add(g.multiply(y, cos), g.multiply(turned, sin))

    def _rotation(self) -> tuple[V, V]:
        """cos and sin of every position and feature, (N, 1, 1, T, D)."""
        g, (frequency_D, scaling) = self.g, self.frequencies()
        position = g.reshape(g.to_float(self.inputs.positions_NT), (0, 1, 1, -1, 1))
        angle = g.multiply(position, g.constant(frequency_D))
        scale = g.constant(torch.tensor([scaling]))
        return g.multiply(g.cos(angle), scale), g.multiply(g.sin(angle), scale)

    def frequencies(self) -> tuple[Tensor, float]:
        return frequencies(self.source.config)

    def mask(self, block: int) -> V:
        """What is added to the scores of a block, (N, 1, 1, T, S)."""
        seen = window(self.source.config, block)
        if seen not in self.masks:
            g = self.g
            query = g.reshape(g.to_float(self.inputs.positions_NT), (0, 1, 1, -1, 1))
            # A key stands where as many tokens come before it: padding does not count.
            before = g.add(g.to_float(g.running_count(self.inputs.mask_NS)), g.constant(torch.tensor([-1.0])))
            key = g.reshape(before, (0, 1, 1, 1, -1))
            mask = g.reshape(g.to_float(self.inputs.mask_NS), (0, 1, 1, 1, -1))
            self.masks[seen] = g.bias_where(query, key, mask, seen)
        return self.masks[seen]
