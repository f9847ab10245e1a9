"""Qwen3: Llama's block with norms on the heads of q and k."""

from upq.models._base import FAMILIES
from upq.models.llama import LLAMA

FAMILIES.register("qwen3")(LLAMA)
