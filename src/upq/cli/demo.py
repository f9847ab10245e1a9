"""`upq demo`: the main job on a model that this machine trains for itself, before and after."""

from __future__ import annotations


def demo() -> None:
    """Train a small instruct model, quantise it, and compare answers."""
