"""Mistral 7B and its successors: Llama's block with an optional sliding window."""

from upq.model.families._base import FAMILIES
from upq.model.families.llama import LLAMA

FAMILIES.register("mistral")(LLAMA)
