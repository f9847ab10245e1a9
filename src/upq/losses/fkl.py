"""Forward KL(p‖q): the cross-entropy to the teacher less its entropy; mass-covering."""

from __future__ import annotations

from pydantic import BaseModel
from torch import Tensor

from upq.core.config import Strict
from upq.losses._base import LOSSES, Divergence


@LOSSES.register("fkl")
class Fkl(Divergence):
    class Config(Strict):
        pass

    def __init__(self, config: BaseModel) -> None: ...

    def per_token(self, logq_TV: Tensor, logp_TV: Tensor) -> tuple[Tensor, Tensor]:
        p_TV = logp_TV.exp()
        value_T = (p_TV * (logp_TV - logq_TV)).sum(-1)
        return value_T, logq_TV.exp().sub_(p_TV)
