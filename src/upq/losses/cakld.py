"""Confidence-aware KL (BitDistiller, arXiv 2402.10631): γ·KL(q‖p) + (1-γ)·KL(p‖q).

γ is the teacher's mean probability of the text: the surer the teacher, the more mode-seeking the loss. Where the recipe
leaves γ open, it is measured on the first calibration rows.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from upq.core.config import Strict
from upq.losses._base import LOSSES, Divergence
from upq.losses.fkl import Fkl
from upq.losses.rkl import Rkl


@LOSSES.register("cakld")
class Cakld(Divergence):
    class Config(Strict):
        confidence: float | None = Field(None, ge=0, le=1)

    def __init__(self, config: Config) -> None:
        if config.confidence is None:
            raise ValueError("cakld needs a confidence; measure it with distill.trainer.confidence")
        self.gamma = config.confidence
        self._forward, self._reverse = Fkl(Fkl.Config()), Rkl(Rkl.Config())

    def per_token(self, logq_TV: Tensor, logp_TV: Tensor) -> tuple[Tensor, Tensor]:
        forward_T, d_forward_TV = self._forward.per_token(logq_TV, logp_TV)
        reverse_T, d_reverse_TV = self._reverse.per_token(logq_TV, logp_TV)
        value_T = self.gamma * reverse_T + (1 - self.gamma) * forward_T
        return value_T, d_reverse_TV.mul_(self.gamma).add_(d_forward_TV, alpha=1 - self.gamma)
