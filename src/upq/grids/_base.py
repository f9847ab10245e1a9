from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from upq.core.errors import UPQError
from upq.core.levels import Levels, Uniform
from upq.core.registry import Registry
from upq.core.scales import REAL_SCALES
from upq.core.scales import SMALLEST_SCALE as SMALLEST_SCALE
from upq.core.scheme import PER_CHANNEL, QTensor, QuantScheme, to_groups

Params = dict[str, Tensor]  # parameters of a grid, each float32, (O, G) or, what a row shares, (O, 1)
ZERO = "zero"  # the parameter that is a zero point, in grids that learn one
OUTER = "outer"  # the one that all scales of a row or of the matrix are multiplied with, in grids whose scales have it

# A 2-bit row of n Gaussian weights wants Δ ≈ 2σ, and its maximum is near σ·sqrt(2 ln n): 0.4 to 0.9 of it. Heavy
# tails go lower; 1.3 lets short rows of few distinct magnitudes (INT4 values) put their maximum inside the top cell.
SHRINK = torch.linspace(0.10, 1.30, 61)


class Grid(ABC):
    """Law (tests/test_grids.py): `fake(w, p, s) == freeze(w, p, s).dequantize()`, bit for bit."""

    widths: ClassVar[Sequence[int]] = range(2, 9)
    scale_dtypes: ClassVar[tuple[str, ...]] = REAL_SCALES  # the first is the usual one
    group_sizes: ClassVar[tuple[int, ...]] = ()  # the ones it has; none: any
    uniform: ClassVar[bool] = True  # its levels are evenly spaced, and `scale_and_zero` has their zero points
    vectors: ClassVar[bool] = False  # a code belongs to several weights: no method rounds one of them alone
    fixed: ClassVar[frozenset[str]] = frozenset()  # parameters that do not learn
    scales_learn: ClassVar[bool] = True

    @abstractmethod
    def init(self, w_OI: Tensor, scheme: QuantScheme) -> Params:
        """Parameters whose levels just cover the range of each group."""

    @abstractmethod
    def fake(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
        """Quantised-dequantised weight, float32, with straight-through gradients for `w_OI` and what learns."""

    @abstractmethod
    def codes(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> Tensor:
        """The levels that `fake` takes, as codes (O, I), uint8."""

    def freeze(self, w_OI: Tensor, params: Params, scheme: QuantScheme) -> QTensor:
        """The value that `fake` computes."""
        return self.qtensor(self.codes(w_OI, params, scheme), params, scheme)

    @torch.no_grad()
    def qtensor(self, codes_OI: Tensor, params: Params, scheme: QuantScheme) -> QTensor:
        """The value of these codes."""
        scale_OG, levels = self.scale_and_levels(params, scheme)
        outer_O1 = params[OUTER].detach() if scheme.scale.outer else None
        inner_OG = scale_OG if outer_O1 is None else scale_OG / outer_O1
        stored_OG = self.store_scale(scheme.scale.encode(inner_OG), levels)
        return QTensor(codes_OI, stored_OG, levels, scheme, outer_O1)

    def scale_and_zero(self, params: Params, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
        """Scale and zero point (O, G), float32, of uniform levels: as stored, differentiable."""
        raise NotImplementedError

    def scale_and_levels(self, params: Params, scheme: QuantScheme) -> tuple[Tensor, Levels]:
        """Scale (O, G), float32, and levels of the codes that `freeze` gives: as stored, differentiable."""
        scale_OG, zero_OG = self.scale_and_zero(params, scheme)
        return scale_OG, self.shared(scheme) or Uniform(zero_OG)

    def zero(self, scheme: QuantScheme) -> float | None:
        """The zero point all groups share, or None where each group stores its own."""
        return None

    def shared(self, scheme: QuantScheme) -> Levels | None:
        """The levels all groups share, or None where each group has its own."""
        zero = self.zero(scheme)
        return None if zero is None else Uniform(zero)

    def check_columns(self, columns: int, scheme: QuantScheme) -> None:
        """Raise UPQError for rows of so many weights that the scheme cannot cut."""
        scheme.groups(columns)

    def of_matrix(self, scheme: QuantScheme) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What a weight stores once, beside its codes and scales: shape and type by name."""
        return {}

    def beside(self, scheme: QuantScheme) -> dict[str, torch.dtype]:
        """What each group stores beside its scale, to have levels of its own: tensors (O, G) by name."""
        return {} if self.shared(scheme) is not None else {ZERO: scheme.scale_torch_dtype}

    def store_levels(self, q: QTensor) -> dict[str, Tensor]:
        """The tensors of `beside` and `of_matrix`."""
        return {name: q.zero_OG.to(dtype) for name, dtype in self.beside(q.scheme).items()}

    def store_scale(self, stored_OG: Tensor, levels: Levels) -> Tensor:
        """Scales as their type encodes them, with what levels of its own a group stores in free bits."""
        return stored_OG

    def load_levels(self, beside: dict[str, Tensor], scale_OG: Tensor, scheme: QuantScheme) -> Levels:
        """The levels that `store_levels` and `store_scale` have stored."""
        return self.shared(scheme) or Uniform(beside[ZERO].float())

    def settled(self, weights: Iterable[Tensor]) -> Self:
        """The same grid, with what the scales of all these matrices share chosen: of fused matrices, once for all."""
        return self

    def candidates(self, w_OI: Tensor, scheme: QuantScheme, importance_I: Tensor) -> Iterator[Params]:
        """Parameters worth a try beside those of `init`."""
        for shrink in SHRINK.tolist():
            yield self.init(w_OI * shrink, scheme)

    def search(self, w_OI: Tensor, scheme: QuantScheme, importance_I: Tensor) -> Params:
        """Per group, the parameters of least squared error among `init` and `candidates`."""
        tried = chain([self.init(w_OI, scheme)], self.candidates(w_OI, scheme, importance_I))
        return self._best(w_OI, tried, scheme, importance_I)

    def _best(self, w_OI: Tensor, tried: Iterable[Params], scheme: QuantScheme, importance_I: Tensor) -> Params:
        """Per group, the first of those with the least squared error."""
        each = iter(tried)
        best = next(each)
        best_error_OG = self._error(w_OI, best, scheme, importance_I)
        for params in each:
            error_OG = self._error(w_OI, params, scheme, importance_I)
            better_OG = error_OG < best_error_OG
            own = {k: v for k, v in best.items() if v.shape == error_OG.shape}  # and not what a row shares
            best |= {k: torch.where(better_OG, params[k], v) for k, v in own.items()}
            best_error_OG = torch.where(better_OG, error_OG, best_error_OG)
        return best

    def _error(self, w_OI: Tensor, params: Params, scheme: QuantScheme, importance_I: Tensor) -> Tensor:
        error_OI = (self.fake(w_OI, params, scheme) - w_OI).square() * importance_I
        return to_groups(error_OI, scheme).sum(-1)


GRIDS: Registry[Grid] = Registry("upq.grids", "grid")


class _StoredScale(torch.autograd.Function):
    """Round a scale to the type it is stored in; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: object, scale_OG: Tensor, scheme: QuantScheme, outer_O1: Tensor | None) -> Tensor:
        kind = scheme.scale
        if outer_O1 is None:
            return kind.decode(kind.encode(scale_OG))
        return kind.decode(kind.encode(scale_OG / outer_O1)) * outer_O1

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[0], None, None


# Weights at a time on the CPU, so that they and their temporaries stay in its caches. The bits are the same. On SEQ the
# search for the scales of 2048 x 2048 weights takes 0.68 s of one core in place of 2.6. The quantised weight of 8192 x
# 2048 takes 0.04 s in place of 0.23, its gradient 0.15 in place of 0.44.
CHUNK = 1 << 18


def stretches_of_rows(w: Tensor) -> Iterator[slice]:
    """Slices of rows of `w` that fit a processor's caches; on other devices one slice of all rows."""
    rows = len(w)
    if type(w) is Tensor and w.device.type == "cpu" and w.numel() > CHUNK:
        rows = max(1, CHUNK * len(w) // w.numel())
    return (slice(start, start + rows) for start in range(0, len(w), max(rows, 1)))


def stored_scale(scale_OG: Tensor, scheme: QuantScheme, outer_O1: Tensor | None = None) -> Tensor:
    """The float32 value that a scale has after a round trip through `scheme.scale`, of which `outer_O1` is a factor."""
    rounded: Tensor = _StoredScale.apply(scale_OG, scheme, outer_O1)  # type: ignore[no-untyped-call]
    return rounded


def check_scheme(scheme: QuantScheme) -> None:
    """Raise UPQError for what the grid of a scheme has no place for."""
    grid = GRIDS.get(scheme.grid)
    if scheme.bits not in grid.widths:
        raise UPQError(f"bits={scheme.bits}: grid {scheme.grid} has {_listed(grid.widths)}")
    if scheme.scale_dtype not in grid.scale_dtypes:
        raise UPQError(
            f"scale_dtype={scheme.scale_dtype}: grid {scheme.grid} stores scales in {_listed(grid.scale_dtypes)}"
        )
    if grid.group_sizes and scheme.group_size not in grid.group_sizes:
        sizes = [f"{size} weights" if size != PER_CHANNEL else "a whole row (-1)" for size in grid.group_sizes]
        raise UPQError(f"group_size={scheme.group_size}: grid {scheme.grid} has groups of {_listed(sizes)}")


def scheme_of(*, bits: int, grid: str, group_size: int = PER_CHANNEL, scale_dtype: str | None = None) -> QuantScheme:
    """A scheme, with the grid's usual type of scales if none is named.

    Raises UPQError for what the grid has no place for.
    """
    scale_dtype = scale_dtype or GRIDS.get(grid).scale_dtypes[0]
    scheme = QuantScheme(bits=bits, grid=grid, group_size=group_size, scale_dtype=scale_dtype)
    check_scheme(scheme)
    return scheme


def _listed(values: Sequence[object]) -> str:
    return f"{values[0]} to {values[-1]}" if len(values) > 3 else " or ".join(map(str, values))


def learned(params: Params, scheme: QuantScheme) -> Params:
    """Those of a grid's parameters that learn."""
    fixed = GRIDS.get(scheme.grid).fixed
    return {name: value for name, value in params.items() if name not in fixed}
