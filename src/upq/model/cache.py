"""The cache of keys, values and states under the name that a decoder gives it."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

# transformers 5.24 renamed the second to the first.
NAMES = ("cache", "past_key_values")


def cache_name(forward: Callable[..., Any]) -> str | None:
    """Of the argument, and of the same in what is returned; None where `forward` takes no cache of keys and values."""
    taken = signature(forward).parameters
    return next((name for name in NAMES if name in taken), None)
