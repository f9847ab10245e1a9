"""SmolLM3: Llama's block, some layers without rotary positions."""

from upq.model.families._base import FAMILIES
from upq.model.families.llama import LLAMA

FAMILIES.register("smollm3")(LLAMA)
