"""BRECQ (arXiv 2102.05426) and TesseraQ (arXiv 2410.19103): learn for each weight which of its two levels it takes.

`harden: progressive` is TesseraQ's: at each of twenty points the weights nearest to a level go there for good, and the
others learn on. `harden: penalty` is BRECQ's: λ Σ 1 - |2h - 1|^β beside the error, none in the first fifth of the
steps, then β falls linearly from 20 to 2. The scale learns too (TesseraQ's dequantisation scale, as the grid's
logarithm). The error is not weighed by Fisher information: BRECQ's released runs do not either.
"""

from __future__ import annotations

from upq.blockwise import _rounding
from upq.blockwise._base import METHODS, BlockTask
from upq.core.scheme import QuantScheme
from upq.nn.fake_quant import Solution


@METHODS.register("adaround")
class AdaRound(_rounding.LearnedRounding):
    class Config(_rounding.Rounding):
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    def solve(self, task: BlockTask, scheme: QuantScheme) -> dict[str, Solution]:
        return _rounding.solve(task, scheme, self.config, lambda _name, v_OI: _rounding.Learned(v_OI))
