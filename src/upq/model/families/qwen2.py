"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v."""

from upq.model.families._base import FAMILIES
from upq.model.families.llama import LLAMA

FAMILIES.register("qwen2")(LLAMA)
