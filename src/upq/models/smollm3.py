"""SmolLM3: Llama's block, some layers without rotary positions."""

from upq.models._base import FAMILIES
from upq.models.llama import LLAMA

FAMILIES.register("smollm3")(LLAMA)
