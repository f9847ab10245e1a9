"""Changes of a model's weights that leave its function as it is, so that it is easier to quantise. One file each."""

from upq.transforms._base import TRANSFORMS, Transform
from upq.transforms._write import write_transformed

__all__ = ["TRANSFORMS", "Transform", "write_transformed"]
