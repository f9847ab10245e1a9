"""The sliding window of a decoder block, as transformers' module of the family applies it.

config.json may hold keys of another family, from which it was copied. The module does not look at them.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

_EVERY_BLOCK = ("mistral", "mixtral", "phi3", "qwen3_moe")  # by `model_type`
_BY_LAYER_TYPE = ("qwen2", "qwen3", "smollm3", "gemma3_text", "olmo3", "gpt_oss")


def window(config: PretrainedConfig, block: int) -> int | None:
    """Tokens that a position of block number `block` sees, itself included; None: all. Of Llama and these families."""
    known: Any = config
    if config.model_type in _EVERY_BLOCK:
        return known.sliding_window  # type: ignore[no-any-return]
    if config.model_type in _BY_LAYER_TYPE and known.layer_types[block] == "sliding_attention":
        return known.sliding_window if getattr(known, "use_sliding_window", True) else None
    return None
