"""Generalised Jensen-Shannon divergence (UPQ, arXiv 2506.09104; GKD, arXiv 2306.13649).

    GJS_β(p, q) = β·KL(p‖m) + (1-β)·KL(q‖m),   m = β·p + (1-β)·q

Bounded by log 2, so a student that is far off does not dominate a batch. β → 0 and β → 1, divided by β or (1-β), are
the two KL directions; at the ends themselves the divergence is 0 everywhere, so β must lie strictly between.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from upq.core.config import Strict
from upq.kernels import training
from upq.losses._base import LOSSES, Divergence


@LOSSES.register("gjs")
class Gjs(Divergence):
    class Config(Strict):
        beta: float = Field(0.5, gt=0, lt=1)

    def __init__(self, config: Config) -> None:
        self.beta = config.beta

    def of_logits(self, student_TV: Tensor, teacher_TV: Tensor) -> tuple[Tensor, Tensor]:
        if training.takes_logits(student_TV, teacher_TV):
            return training.gjs(student_TV, teacher_TV, self.beta)
        return super().of_logits(student_TV, teacher_TV)

    def per_token(self, logq_TV: Tensor, logp_TV: Tensor) -> tuple[Tensor, Tensor]:
        p_TV, q_TV = logp_TV.exp(), logq_TV.exp()
        # The floor keeps 0·log(0/0) at 0 where both probabilities underflow.
        logm_TV = (self.beta * p_TV).add_(q_TV, alpha=1 - self.beta).clamp_min_(1e-38).log_()
        ratio_TV = logq_TV - logm_TV
        kl_qm_T = (q_TV * ratio_TV).sum(-1)
        kl_pm_T = p_TV.mul_(logp_TV - logm_TV).sum(-1)
        # d/dz: the terms through m cancel against q's own; (1-β)·q·(log(q/m) - KL(q‖m)) is left.
        grad_TV = ratio_TV.sub_(kl_qm_T[:, None]).mul_(q_TV).mul_(1 - self.beta)
        return self.beta * kl_pm_T + (1 - self.beta) * kl_qm_T, grad_TV
