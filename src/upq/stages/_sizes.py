"""What a stage needs, and the machine that it runs on. `upq.model.sizes` has the sizes of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from upq.model.sizes import Bytes, Sizes, sizes_of

__all__ = ["Machine", "Need", "Saving", "Sizes", "Speed", "need", "sizes_of"]


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a machine: floating-point operations in a second, and bytes moved; `flops_bf16` where it differs."""

    flops: float
    moved: float
    flops_bf16: float | None = None

    def seconds(self, need: Need) -> float:
        flops = self.flops_bf16 if need.bf16 and self.flops_bf16 else self.flops
        return need.flops / flops + need.moved / self.moved


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a run is planned for: `memory` is in bytes, of one GPU or, without GPUs, of the machine."""

    memory: int
    gpus: int = 0
    speed: Speed | None = None

    @property
    def processes(self) -> int:
        return max(1, self.gpus)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpus else "cpu")


@dataclass(frozen=True, slots=True)
class Need:
    """What a stage needs in one process: bytes in memory at its peak, bytes it leaves on disk, and its work.

    `loose` is the part of the memory that comes and goes in small tensors. Work is floating-point operations of
    products, and bytes that all other operations move. `bf16`: the products are in bfloat16.
    """

    tokens: int
    memory: int
    disk: int
    loose: int = 0
    flops: float = 0.0
    moved: float = 0.0
    bf16: bool = False


@dataclass(frozen=True, slots=True)
class Saving:
    """Settings that may save memory, by a stage's own keys. Those of a lower `rank` cost less and are tried first."""

    rank: int
    settings: tuple[str, ...]
    other_artefact: bool = False  # proposed only where nothing else fits


def need(tokens: int, peak: Bytes, disk: float, *, flops: float, moved: float, bf16: bool = False) -> Need:
    return Need(tokens, int(peak.all), int(disk), int(peak.loose), flops, moved, bf16)
