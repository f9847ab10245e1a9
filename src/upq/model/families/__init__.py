"""Model families as data, and the reading of Hugging Face models."""

from upq.model.families._base import FAMILIES, ModelSpec

__all__ = ["FAMILIES", "ModelSpec"]
