"""What llama.cpp must know of a model beside its weights: hyper-parameters, and how it wants rows and names.

Follows llama.cpp's own converter (conversion/llama.py, qwen.py, smollm.py); names come from gguf's tensor maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from upq.core.errors import UPQError
from upq.model.windows import window

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
}
# llama.cpp turns neighbouring features of a head in these, transformers features half a head apart.
_PERMUTED = (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.SMOLLM3)
# Linears whose biases llama.cpp reads, by family; in Llama's all. gguf's maps have names for those that it does not.
BIASED = {"qwen2": ("q_proj", "k_proj", "v_proj"), "qwen3": (), "smollm3": ()}


@dataclass(frozen=True)
class LlamaCpp:
    """A transformers configuration in llama.cpp's terms."""

    config: PretrainedConfig

    @cached_property
    def arch(self) -> gguf.MODEL_ARCH:
        if self.config.model_type not in _ARCHITECTURES:
            raise UPQError(f"gguf: no llama.cpp architecture is known for the family {self.config.model_type!r}")
        return _ARCHITECTURES[self.config.model_type]

    @cached_property
    def head_dim(self) -> int:
        config = self.config
        dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return dim

    @cached_property
    def rope(self) -> dict[str, Any]:
        found: dict[str, Any] = dict(self.config.rope_parameters)
        return found

    def check(self) -> tuple[str, ...]:
        """Refuse what llama.cpp would compute differently; what remains is said in the notes."""
        config, notes = self.config, []
        if (act := config.hidden_act) != "silu":
            raise UPQError(f"gguf: llama.cpp computes silu in this family, the model {act}")
        if (partial := self.rope.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
            raise UPQError(f"gguf: rotary positions on a part of the head ({partial}) are not supported")
        kind = self.rope.get("rope_type", "default")
        if kind not in ("default", "linear", "yarn", "llama3"):
            raise UPQError(f"gguf: llama.cpp has no rotary scaling {kind!r} for this family")
        if kind == "yarn" and any(self.rope.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim")):
            raise UPQError("gguf: llama.cpp fixes yarn's attention factor; this model sets its own")
        if kind == "yarn" and not self.rope.get("truncate", True):
            raise UPQError("gguf: llama.cpp rounds the range that yarn corrects; this model does not")
        if self.arch == gguf.MODEL_ARCH.SMOLLM3:
            wanted = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
            if list(config.no_rope_layers) != wanted:
                raise UPQError("gguf: llama.cpp leaves rotary positions out of every fourth layer; this model does not")
        windows = {window(config, block) for block in range(config.num_hidden_layers)} - {None}
        for size in sorted(w for w in windows if w is not None and w < config.max_position_embeddings):
            notes.append(f"llama.cpp does not apply the sliding window of {size}: longer texts are attended in full")
        return tuple(notes)

    def tensor_names(self, names: list[str]) -> dict[str, str]:
        """llama.cpp's name of each weight."""
        table = gguf.get_tensor_name_map(self.arch, self.config.num_hidden_layers)
        found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
        for name, known in found.items():
            if known is None:
                raise UPQError(f"gguf: llama.cpp has no place for {name} in the architecture {self.arch.name.lower()}")
        return {name: known for name, known in found.items() if known is not None}

    def row_order(self, name: str, rows: int) -> Tensor | None:
        """Which row of the weight `name` goes where: entry r is the row that llama.cpp has at r. None: as they are."""
        if self.arch not in _PERMUTED:
            return None
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = heads.get(name.split(".")[-2])
        return None if count is None else torch.arange(rows).view(count, 2, -1).transpose(1, 2).flatten()

    def extra_tensors(self) -> dict[str, Tensor]:
        """Llama 3's rotary scaling, which llama.cpp wants as a factor of each frequency."""
        if self.rope.get("rope_type") != "llama3":
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
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
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
