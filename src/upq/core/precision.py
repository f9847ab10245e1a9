"""The type of products: in a stage float32 or bfloat16 by autocast, and elsewhere what a whole model is computed in."""

from __future__ import annotations

import time
from functools import cache
from typing import Literal, TypeVar

import psutil
import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)
Precision = Literal["auto", "bf16", "fp32"]

# With AVX512-BF16 a step of one block takes half the time: 2.4 s against 4.8 at width 2,048, 0.68 against 1.3 at 1,024
# and 0.22 against 0.40 at 512 (docs/log/cost.md); blocks of SmolLM2-135M (576) end with the same errors. At width 64 it
# was slower. Narrow models stay in float32, so that the machine does not change their results.
_WIDE = 512
_SIDE = 128  # of the matrices that are timed


@cache
def cpu_dtype() -> torch.dtype:
    """Of float32 and bfloat16 the one that this CPU multiplies faster; measured once a process, in 7 ms.

    A CPU without instructions for bfloat16 is 20 to 60 times slower in it: 1.4 to 2.8 GFLOP/s against 64 to 84, one
    thread with AVX2.
    """
    return torch.bfloat16 if _seconds(torch.bfloat16) < _seconds(torch.float32) else torch.float32


def _seconds(dtype: torch.dtype) -> float:
    """The least of three products, after one that prepares the library."""
    matrix, times = torch.ones(_SIDE, _SIDE, dtype=dtype), list[float]()
    for _ in range(4):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def computes_in_bf16(precision: Precision, device: torch.device, width: int, on_cpu: torch.dtype | None = None) -> bool:
    """Whether products on `device` are autocast to bfloat16, for a model of hidden size `width`.

    `on_cpu`: what a run began with in place of `cpu_dtype()`.
    """
    if precision != "auto":
        return precision == "bf16"
    return device.type != "cpu" or (width >= _WIDE and (on_cpu or cpu_dtype()) == torch.bfloat16)


def compute_dtype(own: torch.dtype, device: torch.device, on_cpu: torch.dtype | None = None) -> torch.dtype:
    """What a model that is stored in `own` is computed in: its own type, or float32 where that is faster.

    float16 is computed in float32 on every CPU: none is faster in it, and hidden states above 65,504 overflow.
    """
    if device.type != "cpu" or own.itemsize != 2:
        return own
    return own if own == (on_cpu or cpu_dtype()) else torch.float32


def to_compute_dtype(model: M) -> M:
    """A loaded model in its `compute_dtype`; in its own type where memory is too small for the other."""
    floats = [p for p in model.parameters() if p.is_floating_point()]
    own, device = floats[0].dtype, floats[0].device
    dtype = compute_dtype(own, device)
    more = sum(p.numel() * (dtype.itemsize - p.dtype.itemsize) for p in floats)
    if dtype != own and more < psutil.virtual_memory().available:
        model.to(dtype)
    return model


def dtype_name(dtype: torch.dtype) -> str:
    """float32 and not torch.float32, as config.json has it."""
    return str(dtype).removeprefix("torch.")
