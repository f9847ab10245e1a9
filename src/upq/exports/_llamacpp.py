"""What llama.cpp must know of a model beside its weights: hyper-parameters, and how it wants rows and names.

Follows llama.cpp's own converter (conversion/*.py) and what its models read (src/models/*.cpp); names come from gguf's
tensor maps. What a family has of its own is a value of `FAMILIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import gguf
import torch
from gguf import MODEL_ARCH
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from upq.core.errors import UPQError
from upq.exports._checkpoint import as_checkpoint, expert_by_expert, stacked
from upq.exports._source import Source, Weight
from upq.model.loading import text_config
from upq.model.windows import window

_ATTENTION = ("q_proj", "k_proj", "v_proj")
_SCALINGS = ("default", "linear", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How llama.cpp has a family of transformers."""

    arch: MODEL_ARCH
    # It turns neighbouring features of a head in these, transformers features half a head apart.
    permuted: bool = False
    # Linears whose biases it reads; None: all. gguf's maps have names for those that it does not.
    biases: tuple[str, ...] | None = ()
    activation: str = "silu"
    norm_shift: float = 0.0  # in its norms, where the model adds it itself
    scalings: tuple[str, ...] = _SCALINGS  # of rotary positions
    partial_rotation: bool = False  # of the first features of a head
    any_yarn: bool = False  # its own converter writes yarn with a range that it rounds and the model does not
    # The last of so many blocks attends to all tokens, the others to a window; None: it applies no window.
    period: int | None = None
    local_theta: float | None = None  # base of the rotary positions within windows; None: that of the others
    even_heads: bool = False  # a head has hidden_size / num_attention_heads features
    own_head: bool = False  # it wants a head beside the embedding
    experts: tuple[str, str] | None = None  # keys of the configuration: how many, and their features
    scales: Mapping[str, str] = field(default_factory=dict)  # the writer's name to the configuration's
    fixed: Callable[[Any], Mapping[str, Any]] = lambda config: {}  # what it computes whatever the configuration says


def _gemma3(config: Any) -> dict[str, Any]:
    largest = config.num_hidden_layers == 62  # Gemma 3 27B, by which llama.cpp knows its scale
    scale = config.hidden_size // config.num_attention_heads if largest else config.head_dim
    capping = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    return {"query_pre_attn_scalar": scale, "use_bidirectional_attention": False, **capping}


_OLMO = Family(arch=MODEL_ARCH.OLMO2, period=4, even_heads=True, own_head=True)
# By transformers' `model_type`.
FAMILIES: Mapping[str, Family] = {
    "llama": Family(arch=MODEL_ARCH.LLAMA, permuted=True, biases=None, scalings=(*_SCALINGS, "llama3")),
    "mistral": Family(arch=MODEL_ARCH.LLAMA, permuted=True, biases=None, scalings=(*_SCALINGS, "llama3")),
    "qwen2": Family(arch=MODEL_ARCH.QWEN2, biases=_ATTENTION, scalings=(*_SCALINGS, "llama3")),
    "qwen3": Family(arch=MODEL_ARCH.QWEN3, scalings=(*_SCALINGS, "llama3")),
    "smollm3": Family(
        arch=MODEL_ARCH.SMOLLM3,
        permuted=True,
        scalings=(*_SCALINGS, "llama3"),
        fixed=lambda config: {"no_rope_layers": [int(n % 4 != 0) for n in range(1, config.num_hidden_layers + 1)]},
    ),
    "mixtral": Family(
        arch=MODEL_ARCH.LLAMA, permuted=True, biases=None, experts=("num_local_experts", "intermediate_size")
    ),
    "granite": Family(
        arch=MODEL_ARCH.GRANITE,
        permuted=True,
        biases=None,
        scalings=(*_SCALINGS, "llama3"),
        scales={
            "attention_scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    "gemma3_text": Family(
        arch=MODEL_ARCH.GEMMA3,
        activation="gelu_pytorch_tanh",
        norm_shift=1.0,
        scalings=("default", "linear"),
        period=6,
        local_theta=10_000.0,
        fixed=_gemma3,
    ),
    "phi3": Family(arch=MODEL_ARCH.PHI3, scalings=("default", "longrope"), partial_rotation=True, even_heads=True),
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "qwen3_moe": Family(
        arch=MODEL_ARCH.QWEN3MOE,
        experts=("num_experts", "moe_intermediate_size"),
        fixed=lambda config: {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "gpt_oss": Family(
        arch=MODEL_ARCH.GPT_OSS,
        biases=None,
        scalings=("default", "yarn"),
        any_yarn=True,
        period=2,
        own_head=True,
        experts=("num_local_experts", "intermediate_size"),
        fixed=lambda config: {"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "attention_bias": True},
    ),
}


def view(source: Source) -> Source:
    """The artefact as llama.cpp reads it: the language model alone, experts one below the other, norms as factors."""
    model = LlamaCpp(text_config(source.config))
    found = stacked(expert_by_expert(as_checkpoint(source)))
    weights, linears = dict(found.weights), found.linears
    if model.config is not source.config:  # a model with towers
        weights = {n: w for name, w in weights.items() if (n := _of_language(name)) is not None}
        linears = frozenset(n for name in linears if (n := _of_language(name)) is not None)
    weights = {name: replace(weight, name=name, stored=weight.origin) for name, weight in weights.items()}
    if model.family.norm_shift:
        weights = {name: _shifted(weight, model.family.norm_shift) for name, weight in weights.items()}
    return replace(found, config=model.config, weights=weights, linears=linears)


def _of_language(name: str) -> str | None:
    prefix = "language_model."
    return name.removeprefix(prefix) if name.startswith(prefix) else None


def _shifted(weight: Weight, shift: float) -> Weight:
    return replace(weight, shift=shift) if weight.name.endswith("norm.weight") else weight


@dataclass(frozen=True)
class LlamaCpp:
    """A transformers configuration in llama.cpp's terms."""

    config: PretrainedConfig

    @cached_property
    def family(self) -> Family:
        if self.config.model_type not in FAMILIES:
            raise UPQError(f"gguf: no llama.cpp architecture is known for the family {self.config.model_type!r}")
        return FAMILIES[self.config.model_type]

    @property
    def arch(self) -> MODEL_ARCH:
        return self.family.arch

    @cached_property
    def head_dim(self) -> int:
        config = self.config
        dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return dim

    @cached_property
    def rope(self) -> dict[str, Any]:
        """Of blocks that attend to all tokens."""
        found: dict[str, Any] = dict(self.config.rope_parameters)
        return dict(found.get("full_attention", found))

    @cached_property
    def windows(self) -> list[int | None]:
        """Of each block."""
        return [window(self.config, block) for block in range(self.config.num_hidden_layers)]

    def check(self) -> tuple[str, ...]:
        """Refuse what llama.cpp would compute differently; what remains is said in the notes."""
        config, family, notes = self.config, self.family, []
        act = getattr(config, "hidden_activation", None) or config.hidden_act
        if act != family.activation:
            raise UPQError(f"gguf: llama.cpp computes {family.activation} in this family, the model {act}")
        for key, value in family.fixed(config).items():
            own = getattr(config, key, None)
            if own != value and (own or value):
                raise UPQError(f"gguf: llama.cpp has {key} {value} in this family, the model {own}")
        if family.even_heads and self.head_dim * config.num_attention_heads != config.hidden_size:
            raise UPQError(f"gguf: llama.cpp has heads of hidden_size/heads here, the model of {self.head_dim}")
        notes += self._check_rope()
        if family.period is None:
            sizes = {size for size in self.windows if size is not None and size < config.max_position_embeddings}
            lost = "llama.cpp does not apply the sliding window of {}: longer texts are attended in full"
            notes += [lost.format(size) for size in sorted(sizes)]
        elif set(self.windows) != {None}:
            self._check_windows(family.period)
        return tuple(notes)

    def _check_rope(self) -> list[str]:
        family, rope = self.family, self.rope
        if (partial := rope.get("partial_rotary_factor", 1.0)) not in (None, 1.0) and not family.partial_rotation:
            raise UPQError(f"gguf: rotary positions on a part of the head ({partial}) are not supported")
        kind = rope.get("rope_type", "default")
        if kind not in family.scalings:
            raise UPQError(f"gguf: llama.cpp has no rotary scaling {kind!r} for this family")
        if kind == "longrope":
            length = rope["original_max_position_embeddings"]
            return [f"llama.cpp takes the factors for long texts for short ones too once its context is over {length}"]
        if kind != "yarn":
            return []
        layers = "full_attention" if "full_attention" in self.config.rope_parameters else None
        _, factor = ROPE_INIT_FUNCTIONS["yarn"](self.config, torch.device("cpu"), layer_type=layers)
        if not math.isclose(factor, 0.1 * math.log(max(1.0, rope["factor"])) + 1, rel_tol=1e-6):
            raise UPQError("gguf: llama.cpp fixes yarn's attention factor; this model sets its own")
        if rope.get("truncate", True):
            return []
        rounded = "llama.cpp rounds the range that yarn corrects; this model does not"
        if not family.any_yarn:
            raise UPQError(f"gguf: {rounded}")
        return [rounded]

    def _check_windows(self, period: int) -> None:
        if len(set(self.windows) - {None}) > 1:
            raise UPQError("gguf: llama.cpp has one size of windows, this model several")
        for block, size in enumerate(self.windows):
            if (size is None) != (block % period == period - 1):
                raise UPQError(f"gguf: llama.cpp has windows but in every block {period} here; block {block} differs")
        local = self.config.rope_parameters.get("sliding_attention")
        if local is not None:
            wanted = self.family.local_theta or self.rope["rope_theta"]
            if local.get("rope_type", "default") != "default" or local["rope_theta"] != wanted:
                raise UPQError(f"gguf: llama.cpp has plain rotary positions of base {wanted} in windows here")

    def tensor_names(self, names: list[str]) -> dict[str, str]:
        """llama.cpp's name of each weight."""
        table = gguf.get_tensor_name_map(self.arch, self.config.num_hidden_layers)
        result = {}
        for name in names:
            whole = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
            known = table.get_name(whole, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise UPQError(f"gguf: llama.cpp has no place for {name} in the architecture {self.arch.name.lower()}")
            result[name] = known
        return result

    def row_order(self, name: str, rows: int) -> Tensor | None:
        """Which row of the weight `name` goes where: entry r is the row that llama.cpp has at r. None: as they are."""
        if not self.family.permuted:
            return None
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = heads.get(name.split(".")[-2])
        return None if count is None else torch.arange(rows).view(count, 2, -1).transpose(1, 2).flatten()

    def extra_tensors(self) -> dict[str, Tensor]:
        """Rotary scalings that llama.cpp wants as a factor of each frequency."""
        kind = self.rope.get("rope_type")
        if kind == "longrope":
            names = {"long": gguf.MODEL_TENSOR.ROPE_FACTORS_LONG, "short": gguf.MODEL_TENSOR.ROPE_FACTORS_SHORT}
            return {
                f"{gguf.TENSOR_NAMES[name]}.weight": torch.tensor(self.rope[f"{length}_factor"], dtype=torch.float32)
                for length, name in names.items()
            }
        if kind != "llama3":
            return {}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        plain = self.rope["rope_theta"] ** (torch.arange(0, self.head_dim, 2, dtype=torch.float32) / -self.head_dim)
        return {"rope_freqs.weight": plain / scaled}

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Every hyper-parameter, in the order of llama.cpp's converter."""
        config, rope = self.config, self.rope
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(int(self.head_dim * (rope.get("partial_rotary_factor") or 1.0)))
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        self._describe_scaling(writer)
        self._describe_family(writer)

    def _describe_scaling(self, writer: gguf.GGUFWriter) -> None:
        config, rope = self.config, self.rope
        kind = rope.get("rope_type", "default")
        if kind in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
            writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(
                rope.get("original_max_position_embeddings") or config.max_position_embeddings
            )
            if rope.get("beta_fast") is not None:
                writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            if rope.get("beta_slow") is not None:
                writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        if kind == "longrope":
            _, factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            writer.add_rope_scaling_attn_factors(factor)

    def _describe_family(self, writer: gguf.GGUFWriter) -> None:
        config, family = self.config, self.family
        for name, key in family.scales.items():
            getattr(writer, f"add_{name}")(getattr(config, key))
        if family.experts is not None:
            count, features = family.experts
            writer.add_expert_count(getattr(config, count))
            writer.add_expert_used_count(config.num_experts_per_tok)
            writer.add_expert_feed_forward_length(getattr(config, features))
        sizes = set(self.windows) - {None}
        if family.period is not None and sizes:
            writer.add_sliding_window(sizes.pop() or 0)
            writer.add_sliding_window_pattern([size is not None for size in self.windows])
            local = config.rope_parameters.get("sliding_attention")
            writer.add_rope_freq_base_swa((local or self.rope)["rope_theta"])
        if family.arch == MODEL_ARCH.PHI3:  # by which llama.cpp tells Phi-4 from the others; it applies none
            writer.add_sliding_window(config.sliding_window or 0)
