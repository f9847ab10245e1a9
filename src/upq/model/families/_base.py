from __future__ import annotations

from dataclasses import dataclass

from upq.core.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Where a family keeps its parts. `groups` run in order; the linears of one group read the same tensor.

    The name of the file is transformers' `config.model_type`. Law: tests/test_families.py.
    """

    groups: tuple[tuple[str, ...], ...]  # linears of a decoder block, by path within it
    decoder: str = "model"  # the stack from embedding to final norm, by path within the causal LM
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    compiled_decoding: bool = False  # its block is Llama's, with no more than what upq/decoding/_parts.py looks at

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group)


FAMILIES: Registry[ModelSpec] = Registry("upq.model.families", "model family")
