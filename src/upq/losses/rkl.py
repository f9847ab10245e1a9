"""Reverse KL(q‖p): mode-seeking; the student drops what the teacher finds unlikely."""

from __future__ import annotations

from pydantic import BaseModel
from torch import Tensor

from upq.core.config import Strict
from upq.losses._base import LOSSES, Divergence


@LOSSES.register("rkl")
class Rkl(Divergence):
    class Config(Strict):
        pass

    def __init__(self, config: BaseModel) -> None: ...

    def per_token(self, logq_TV: Tensor, logp_TV: Tensor) -> tuple[Tensor, Tensor]:
        q_TV, ratio_TV = logq_TV.exp(), logq_TV - logp_TV
        value_T = (q_TV * ratio_TV).sum(-1)
        return value_T, ratio_TV.sub_(value_T[:, None]).mul_(q_TV)
