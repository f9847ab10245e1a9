"""Next-token cross-entropy: plain quantisation-aware training without a teacher, the baseline of the paper."""

from __future__ import annotations

import torch
from pydantic import BaseModel
from torch import Tensor

from upq.core.config import Strict
from upq.losses._base import LOSSES, Loss, ValueAndGrad, log_softmax
from upq.losses._top_k import TopK


@LOSSES.register("ce")
class Ce(Loss):
    class Config(Strict):
        pass

    uses_teacher = False

    def __init__(self, config: BaseModel) -> None: ...

    def __call__(
        self, student_TV: Tensor, teacher: Tensor | TopK | None, target_T: Tensor, mask_T: Tensor
    ) -> ValueAndGrad:
        logq_TV = log_softmax(student_TV)
        value_T = -logq_TV.gather(1, target_T[:, None])[:, 0]
        grad_TV = logq_TV.exp().scatter_add_(1, target_T[:, None], torch.full_like(value_T, -1)[:, None])
        return ValueAndGrad(value_T[mask_T].sum(), grad_TV.mul_(mask_T[:, None]))
