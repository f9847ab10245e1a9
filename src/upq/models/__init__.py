"""Model families as data, and the reading of Hugging Face models."""

from upq.models._base import FAMILIES, ModelSpec

__all__ = ["FAMILIES", "ModelSpec"]
