"""GGML's block types that can carry a QTensor: what each holds exactly, and its bytes.

Shape suffixes: O = out features, I = in features, G = groups in a row, N = blocks in a row, B = bytes.

A weight is d·k with integers k (_integers.py): for SEQ at 2 bits d·{-3, -1, 1, 3} with d = scale/2. Every type stores d
in float16, so the halving must be exact: it is, unless the scale is below 2^-13 and odd in its last bit.

    symmetric types (Q4_0, Q5_0, Q8_0, TQ2_0)   d·k, k in the type's range
    K types (Q2_K, Q4_K)                        d·sc·q - dmin·m with q = code, sc = h, m = h·zero, dmin = d

MXFP4 and NVFP4 hold the grids of that name, codes and scales as they are.

Layouts are those of ggml-common.h and ggml-quants.c; `gguf.quants` is the reader that the export is checked with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from upq.core.scheme import PER_CHANNEL, QTensor
from upq.exports._fp4 import Fp4, fp4
from upq.exports._fp4 import misfit as fp4_misfit
from upq.exports._integers import bounds, misfit, span, step, unit
from upq.exports._source import Weight, plain


@dataclass(frozen=True, slots=True)
class Block(ABC):
    """A GGML type: `name` as in gguf.GGMLQuantizationType, weights and bytes of a block."""

    name: str
    size: int
    bytes: int

    def bytes_of(self, weight: Weight) -> int:
        return weight.numel // self.size * self.bytes

    def misfit(self, weight: Weight) -> str | None:
        """Why this type cannot hold the weight exactly, or None."""
        scheme = weight.scheme
        assert scheme is not None
        columns = weight.shape[1]
        if not plain(scheme):
            return f"grid {scheme.grid} has other levels or scales than {self.name}"
        if columns % self.size:
            return f"rows of {columns} are no whole blocks of {self.size}"
        if scheme.group_size != PER_CHANNEL and scheme.group_size % self.size:
            return f"groups of {scheme.group_size} are no whole blocks of {self.size}"
        return misfit(weight, torch.float16) or self._misfit(weight)

    @abstractmethod
    def _misfit(self, weight: Weight) -> str | None:
        """The same, of codes and zero points alone."""

    @abstractmethod
    def encode(self, q: QTensor) -> Tensor:
        """Rows of blocks, uint8 (O, N·bytes)."""

    def _blocks(self, per_group_OG: Tensor, columns: int) -> Tensor:
        """A value of each group as one of each block (O, N)."""
        blocks = columns // self.size
        return per_group_OG.repeat_interleave(blocks // per_group_OG.shape[1], dim=1)


class Symmetric(Block):
    """d·k with the integer k stored as k + offset in `levels` levels; or (-d)·(-k), where that is what fits."""

    levels: int
    offset: int

    def _misfit(self, weight: Weight) -> str | None:
        if self._sign(*bounds(weight)) == 0:
            low, high = bounds(weight)
            return f"{low} … {high} are not levels of {self.name}"
        return None

    def _sign(self, low: int, high: int) -> int:
        """Of d, so that every k from `low` to `high` can be stored; 0 where neither sign does it."""
        least, most = -self.offset, self.levels - 1 - self.offset
        return 1 if least <= low and high <= most else -1 if least <= -high and -low <= most else 0

    def encode(self, q: QTensor) -> Tensor:
        o, i = q.codes_OI.shape
        sign, step_OG = self._sign(*span(q.zero_OG, q.scheme.levels)), step(q.zero_OG)
        # offset ± k = ±h·code + (offset ∓ h·zero), modulo 256 in the uint8 of the codes
        step_ON1 = self._blocks((sign * step_OG).to(torch.int16).to(torch.uint8), i)[..., None]
        shift_OG = (self.offset - sign * step_OG * q.zero_OG).to(torch.int16).to(torch.uint8)
        stored_ONS = q.codes_OI.view(o, -1, self.size) * step_ON1 + self._blocks(shift_OG, i)[..., None]
        d_ON = self._blocks(sign * unit(q, torch.float16), i)
        return torch.cat(self._fields(_bytes(d_ON), stored_ONS), dim=-1).flatten(1)

    @abstractmethod
    def _fields(self, d_ONB: Tensor, stored_ONS: Tensor) -> list[Tensor]:
        """The parts of a block in their order, each uint8 (O, N, bytes)."""


class Q4_0(Symmetric):
    levels, offset = 16, 8

    def _fields(self, d_ONB: Tensor, stored_ONS: Tensor) -> list[Tensor]:
        return [d_ONB, _nibbles(stored_ONS)]


class Q5_0(Symmetric):
    levels, offset = 32, 16

    def _fields(self, d_ONB: Tensor, stored_ONS: Tensor) -> list[Tensor]:
        fifth = (stored_ONS >> 4).reshape(*stored_ONS.shape[:-1], 4, 8)
        shifts = torch.arange(8, dtype=torch.uint8)
        return [d_ONB, (fifth << shifts).sum(-1, dtype=torch.uint8), _nibbles(stored_ONS & 15)]


class Q8_0(Symmetric):
    levels, offset = 255, 127  # -127 … 127; -128 exists but no quantiser writes it

    def _fields(self, d_ONB: Tensor, stored_ONS: Tensor) -> list[Tensor]:
        return [d_ONB, stored_ONS - 127]  # wraps: the bytes of an int8


class TQ2_0(Symmetric):
    """Made for ternary weights; its fourth level, +2, is the last of `q2_0`, and of `sym` with a negative d."""

    levels, offset = 4, 1

    def _fields(self, d_ONB: Tensor, stored_ONS: Tensor) -> list[Tensor]:
        return [_quarters(stored_ONS), d_ONB]


class _K(Block):
    levels: int
    most: int  # largest sc and m

    def _misfit(self, weight: Weight) -> str | None:
        assert weight.scheme is not None
        if weight.scheme.levels > self.levels:
            return f"{weight.scheme.levels} levels are more than {self.name} has"
        if -bounds(weight)[0] > self.most:
            return f"a zero point is above {self.most}"
        return None

    def encode(self, q: QTensor) -> Tensor:
        o, i = q.codes_OI.shape
        step_OG = step(q.zero_OG)
        d_ON1 = _bytes(self._blocks(unit(q, torch.float16), i))
        sc_ON1 = self._blocks(step_OG.to(torch.uint8), i)[..., None]
        m_ON1 = self._blocks((step_OG * q.zero_OG).to(torch.uint8), i)[..., None]
        fields = self._fields(d_ON1, sc_ON1, m_ON1, q.codes_OI.view(o, -1, self.size))
        return torch.cat(fields, dim=-1).flatten(1)

    @abstractmethod
    def _fields(self, d_ONB: Tensor, sc_ON1: Tensor, m_ON1: Tensor, codes_ONS: Tensor) -> list[Tensor]:
        """The parts of a block in their order, each uint8 (O, N, bytes). All sub-blocks have the same sc and m."""


class Q2_K(_K):
    levels, most = 4, 15

    def _fields(self, d_ONB: Tensor, sc_ON1: Tensor, m_ON1: Tensor, codes_ONS: Tensor) -> list[Tensor]:
        return [(sc_ON1 | m_ON1 << 4).expand(-1, -1, 16), _quarters(codes_ONS), d_ONB, d_ONB]


class Q4_K(_K):
    levels, most = 16, 63

    def _fields(self, d_ONB: Tensor, sc_ON1: Tensor, m_ON1: Tensor, codes_ONS: Tensor) -> list[Tensor]:
        # 12 bytes: the low six bits of sc and m of sub-blocks 0..3 with the top two of 4..7, then those's low nibbles
        low_sc, low_m = sc_ON1 & 63 | sc_ON1 >> 4 << 6, m_ON1 & 63 | m_ON1 >> 4 << 6
        scales = [x.expand(-1, -1, 4) for x in (low_sc, low_m, sc_ON1 & 15 | m_ON1 << 4)]
        halves = codes_ONS.reshape(*codes_ONS.shape[:-1], 4, 2, 32)
        return [d_ONB, d_ONB, *scales, (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2)]


class _Fp4(Block):
    """The grid's own codes and bytes of scales; llama.cpp's E2M1 has the same order of codes."""

    kind: Fp4

    def misfit(self, weight: Weight) -> str | None:
        assert weight.scheme is not None
        if fp4(weight.scheme) != self.kind:
            return f"grid {weight.scheme.grid} is not {self.name}"
        if weight.shape[1] % self.size:
            return f"rows of {weight.shape[1]} are no whole blocks of {self.size}"
        return self._misfit(weight)

    def _misfit(self, weight: Weight) -> str | None:
        return fp4_misfit(weight)

    def encode(self, q: QTensor) -> Tensor:
        o, group = len(q.codes_OI), q.scheme.group_size
        codes_ONGS = q.codes_OI.view(o, -1, self.size // group, group)
        scales_ONG = q.scale_OG.view(o, -1, self.size // group)
        return torch.cat([scales_ONG, _nibbles(codes_ONGS).flatten(2)], dim=-1).flatten(1)


class MXFP4(_Fp4):
    kind = "mxfp4"


class NVFP4(_Fp4):
    """Without its outer scale, which stands beside it in a tensor of its own."""

    kind = "nvfp4"


# Smaller than Q2_K and faster on CPUs, but few of llama.cpp's GPU back-ends have it: only on request.
TERNARY = TQ2_0("TQ2_0", 256, 66)
# By size: the first that holds a weight exactly is taken.
BLOCKS: tuple[Block, ...] = (
    Q2_K("Q2_K", 256, 84),
    MXFP4("MXFP4", 32, 17),
    Q4_0("Q4_0", 32, 18),
    NVFP4("NVFP4", 64, 36),
    Q4_K("Q4_K", 256, 144),
    Q5_0("Q5_0", 32, 22),
    Q8_0("Q8_0", 32, 34),
)


def _bytes(d_ON: Tensor) -> Tensor:
    """float16 (O, N) as its bytes (O, N, 2)."""
    return d_ON.contiguous().view(torch.uint8).view(*d_ON.shape, 2)


def _nibbles(stored_ONS: Tensor) -> Tensor:
    """Byte l of a block (of 32): weight l below, weight l + 16 above, where 16 is half of the block."""
    half = stored_ONS.shape[-1] // 2
    return stored_ONS[..., :half] | stored_ONS[..., half:] << 4


def _quarters(stored_ONS: Tensor) -> Tensor:
    """Blocks of 256 as two runs of 32 bytes: bits 2j of byte l of run n are weight 128·n + 32·j + l."""
    quarters = stored_ONS.reshape(*stored_ONS.shape[:-1], 2, 4, 32)
    packed = quarters[..., 0, :] | quarters[..., 1, :] << 2 | quarters[..., 2, :] << 4 | quarters[..., 3, :] << 6
    return packed.flatten(-2)
