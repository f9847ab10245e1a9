"""LoRA-rounding (CBQ, arXiv 2312.07950): learned rounding whose variable is of low rank, V = V₀ + A·B.

V₀ is AdaRound's start, the weight's own place between its levels; the paper's text leaves the start open, and A·B alone
would put every weight in the middle of its levels. What learns and has moments is A and B.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from upq.blockwise import _rounding
from upq.blockwise._base import METHODS, BlockTask
from upq.core.scheme import QuantScheme
from upq.nn.fake_quant import Solution


@METHODS.register("lora_round")
class LoraRound(_rounding.LearnedRounding):
    class Config(_rounding.Rounding):
        rank: int = Field(8, ge=1)  # of A·B

    config: Config

    def __init__(self, config: Config) -> None:
        self.config = config

    def solve(self, task: BlockTask, scheme: QuantScheme) -> dict[str, Solution]:
        generator = torch.Generator().manual_seed(task.seed)

        def learned(_name: str, v_OI: Tensor) -> _rounding.Learned:
            rows, columns = v_OI.shape
            rank = min(self.config.rank, rows, columns)
            b_rI = torch.randn(rank, columns, generator=generator).div_(rank**0.5)
            return _rounding.Learned(v_OI, (torch.zeros(rows, rank, device=v_OI.device), b_rI.to(v_OI.device)))

        return _rounding.solve(task, scheme, self.config, learned)
