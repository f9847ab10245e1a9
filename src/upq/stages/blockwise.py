"""A block-wise stage: weights become codes, one decoder block after the other."""

from __future__ import annotations

from pydantic import Field

from upq.core.config import Plugin, Strict
from upq.core.precision import Precision
from upq.core.scheme import PER_CHANNEL, QuantScheme


class Blockwise(Strict):
    """A block-wise stage: the weights it is given become codes on `grid`, one decoder block after the other."""

    bits: int
    grid: str = "seq"
    group_size: int = PER_CHANNEL
    method: Plugin
    samples: int = Field(128, ge=1)  # calibration sequences of data.seq_len tokens
    precision: Precision = "auto"  # of the products; weights and hidden states are float32

    def scheme(self) -> QuantScheme:
        return QuantScheme(bits=self.bits, grid=self.grid, group_size=self.group_size)
