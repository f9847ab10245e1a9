"""Qwen3: Llama's block with norms on the heads of q and k."""

from upq.model.families._base import FAMILIES
from upq.model.families.llama import LLAMA

FAMILIES.register("qwen3")(LLAMA)
