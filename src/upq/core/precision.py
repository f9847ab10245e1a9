"""The type of a stage's products: float32, or bfloat16 by autocast around float32 weights."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp32"]

# With AVX512-BF16 a step of one block takes half the time: 2.4 s against 4.8 at width 2,048, 0.68 against 1.3 at 1,024
# (docs/log/cost.md). At width 64 it was slower. Narrow models stay in float32, so that the machine does not
# change their results.
_WIDE = 1024
_BF16 = ("avx512_bf16", "amx_bf16")


def computes_in_bf16(precision: Precision, device: torch.device, width: int) -> bool:
    """Whether products on `device` are autocast to bfloat16, for a model of hidden size `width`."""
    if precision != "auto":
        return precision == "bf16"
    return device.type != "cpu" or (width >= _WIDE and _in_hardware())


def _in_hardware() -> bool:
    """Whether this CPU multiplies bfloat16 itself. Older versions of torch have no such query."""
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name) for name in _BF16)
