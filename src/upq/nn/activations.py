"""Quantisers of activations: inputs of linears, keys and values. They round in float32, and gradients pass through.

Shape suffixes: T tokens, I channels, G groups of a token, S channels of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from upq.core.act_scheme import ActScheme
from upq.core.errors import UPQError
from upq.core.levels import E2M1
from upq.core.scales import SCALE_TYPES
from upq.grids import nearest

_LEAST = 2.0**-120  # below it the inverse of a range overflows: such a token counts as zeros, as in the kernel w2a8
_FP8 = 448.0  # E4M3's largest


class ActQuantiser(nn.Module):
    """Rounds what it is given to `scheme`, and gives it back in its own type.

    Laws (tests/test_activations.py): rounding twice is rounding once, bit for bit, of symmetric schemes; a token does
    not depend on the others; the gradient is that of the identity; `ActScheme()` is what the CPU kernel w2a8 does.
    """

    def __init__(self, scheme: ActScheme, scale: float | None = None) -> None:
        """`scale`: of a static scheme, which needs it."""
        super().__init__()
        assert (scale is not None) == scheme.static
        self.scheme, self.scale = scheme, scale

    def forward(self, x: Tensor) -> Tensor:
        rounded: Tensor = _StraightThrough.apply(x, self)  # type: ignore[no-untyped-call]
        return rounded

    def round(self, x: Tensor) -> Tensor:
        groups = _groups(x.float(), self.scheme)
        if self.scheme.symmetric:
            low, scale, zero = -_largest(self.scheme), self._scale(groups), None
        else:
            low, (scale, zero) = 0.0, _range(groups, self.scheme)
        return _round(groups, scale, zero, low, self.scheme).view(x.shape).to(x.dtype)

    def _scale(self, groups: Tensor) -> Tensor:
        if self.scale is not None:
            return groups.new_tensor(self.scale)
        every = None if self.scheme.per == "tensor" else -1
        peak = groups.abs().amax() if every is None else groups.abs().amax(every, keepdim=True)
        scale = peak * self.scheme.clip / _largest(self.scheme)
        if self.scheme.scale_dtype == "e8m0":
            kind = SCALE_TYPES["e8m0"]
            above = scale.clamp_min(_LEAST).log2().ceil().exp2()  # nothing is cut off
            return torch.where(peak < _LEAST, 0.0, kind.decode(kind.encode(above)))
        return torch.where(peak < _LEAST, 0.0, scale)

    def extra_repr(self) -> str:
        return str(self.scheme)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantiser: ActQuantiser) -> Tensor:
        return quantiser.round(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _largest(scheme: ActScheme) -> float:
    """The largest level of a symmetric scheme."""
    if scheme.kind == "int":
        return 2.0 ** (scheme.bits - 1) - 1
    return max(E2M1) if scheme.kind == "fp4" else _FP8


def _groups(x: Tensor, scheme: ActScheme) -> Tensor:
    """(…, G, S), or as it is where a token has one scale."""
    if scheme.group_size is None:
        return x
    if x.shape[-1] % scheme.group_size:
        raise UPQError(
            f"activations of {x.shape[-1]} channels are no multiple of group_size={scheme.group_size}; set another"
        )
    return x.reshape(*x.shape[:-1], -1, scheme.group_size)


def _range(groups: Tensor, scheme: ActScheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range that holds zero."""
    if scheme.per == "tensor":
        low, high = groups.amin(), groups.amax()
    else:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low) * scheme.clip / (2**scheme.bits - 1)
    scale = torch.where(high - low < _LEAST, 0.0, scale)
    return scale, torch.where(scale > 0, (-low * scheme.clip / scale).round(), 0.0)


def _round(groups: Tensor, scale: Tensor, zero: Tensor | None, low: float, scheme: ActScheme) -> Tensor:
    if scheme.kind == "fp4":
        inside = torch.where(scale > 0, groups / scale, 0.0)
        return nearest(E2M1).level(inside) * scale
    if scheme.kind == "fp8":
        inside = torch.where(scale > 0, groups / scale, 0.0).clamp(-_FP8, _FP8)
        return inside.to(torch.float8_e4m3fn).float() * scale
    if zero is not None:
        codes = (torch.where(scale > 0, groups / scale, 0.0).round() + zero).clamp(low, 2**scheme.bits - 1)
        return (codes - zero) * scale
    largest = _largest(scheme)
    # The kernel multiplies with the range's inverse, which is not that of the rounded scale.
    dynamic = not scheme.static and scheme.clip == 1 and scheme.scale_dtype == "float32"
    every = scheme.per == "tensor"
    if dynamic:
        peak = groups.abs().amax() if every else groups.abs().amax(-1, keepdim=True)
        inverse = torch.where(peak < _LEAST, 0.0, largest / peak)
    else:
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return (groups * inverse).round().clamp(-largest, largest) * scale


def attach(linear: nn.Module, quantiser: ActQuantiser) -> None:
    """From here on a linear reads rounded inputs: one of the model's own class, which has no place for a quantiser."""
    linear.register_forward_pre_hook(_Hook(quantiser))


def attach_inputs(
    block: nn.Module, names: Iterable[str], scheme: ActScheme | None, scales: Mapping[str, float]
) -> None:
    """`attach` for the linears `names` of a block. `scales`: of a static scheme, by name."""
    for name in names if scheme is not None else ():
        assert scheme is not None
        attach(block.get_submodule(name), ActQuantiser(scheme, scales.get(name)))


@torch.no_grad()
def static_scales(
    block: nn.Module, names: Iterable[str], scheme: ActScheme, run: Callable[[], object]
) -> dict[str, float]:
    """By name of a linear, the scale that its inputs' range over a `run` of the block gives. 0: it was not reached."""
    peaks, handles = dict.fromkeys(names, 0.0), []
    for name in peaks:

        def see(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            if args[0].numel():
                peaks[name] = max(peaks[name], float(args[0].abs().amax()))

        handles.append(block.get_submodule(name).register_forward_pre_hook(see))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: peak * scheme.clip / _largest(scheme) for name, peak in peaks.items()}


class _Hook:
    def __init__(self, quantiser: ActQuantiser) -> None:
        self.quantiser = quantiser

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.quantiser(args[0]), *args[1:])
