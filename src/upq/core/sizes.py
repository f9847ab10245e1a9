"""Bytes for a person."""

from __future__ import annotations


def size(count: float) -> str:
    """Three digits and a unit: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
