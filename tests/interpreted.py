"""Triton's interpreter in the place of a GPU, for gemlite. In a process of its own, with TRITON_INTERPRET=1.

gemlite asks for a GPU when it is imported; what it hears here is what an H100 says. It has Triton time its tiles and
takes the fastest; here `TILES` says which that is. And three things are mended that the interpreter does otherwise than
a compiler: it multiplies matrices of bfloat16 as the integers that their bits are, it cuts float32 off to bfloat16
without rounding, and its loops count in Python's numbers, which have no `.to`.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import driver, interpreter

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before anything imports triton"


class _Tiles:
    """How many are timed, and the fastest of them: the one of number `wanted`, or the last if there are fewer."""

    wanted = 0
    timed = 0

    def time(self, _run: Callable[[], None], quantiles: object) -> list[float]:
        self.timed += 1
        return [float(abs(self.timed - 1 - self.wanted))] * 3

    def choose(self, number: int) -> None:
        """For the next product alone."""
        from gemlite.core import GEMLITE_TRITON_KERNELS

        self.wanted, self.timed = number, 0
        for kind in GEMLITE_TRITON_KERNELS:
            for kernel in kind.kernel:
                kernel.cache.clear()


TILES = _Tiles()


class _Index(int):
    def __mul__(self, other: Any) -> Any:
        product = int(self) * other
        return _Share(product) if isinstance(product, float) else product


class _Share(float):
    def to(self, _dtype: tl.dtype) -> int:
        return int(self)


def _numbers(*bounds: int) -> Iterator[_Index]:
    return map(_Index, builtins.range(*bounds))


def _as_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _as_bfloat16(values: np.ndarray) -> np.ndarray:
    rounded: Tensor = torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16)
    return rounded.numpy().view(np.uint16)


def install() -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def rounding_cast(self: Any, src: Any, dst_type: Any) -> Any:
        types = src.dtype.scalar, dst_type.scalar
        if types == (tl.bfloat16, tl.float32):
            return handle(_as_float(src.data), tl.float32)
        if types == (tl.float32, tl.bfloat16):
            return handle(_as_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def float_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        assert a.dtype.scalar == b.dtype.scalar
        if a.dtype.scalar == tl.bfloat16:
            a, b = (handle(_as_float(side.data), tl.float32) for side in (a, b))
        return dot(self, a, b, *rest)

    builder.cast_impl, builder.create_dot = rounding_cast, float_dot
    interpreter.range = _numbers
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132)
    torch.cuda.get_device_properties = lambda *_: card
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    driver.set_active(
        SimpleNamespace(
            utils=SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 232_448}),
            get_current_target=lambda: SimpleNamespace(backend="cuda", arch=90, warp_size=32),
            get_benchmarker=lambda: TILES.time,
        )
    )
