"""The demonstration: the reference model that comes with UPQ, before and after 2 bits."""

from pathlib import Path

REFERENCE = Path(__file__).parent  # made by tools/train_reference.py

__all__ = ["REFERENCE"]
