"""Mistral 7B and its successors: Llama's block with an optional sliding window."""

from upq.models._base import FAMILIES
from upq.models.llama import LLAMA

FAMILIES.register("mistral")(LLAMA)
