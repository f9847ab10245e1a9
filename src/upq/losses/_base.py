"""A loss gives its value and its gradient in one pass over the logits.

The gradient is written out, not left to autograd. It follows from the same probabilities as the value, so a chunk of
logits is read once and nothing of size (tokens, vocabulary) outlives it. Law: equal to float64 autograd of
the definition (tests/test_losses.py).

Shape suffixes: T = tokens, V = vocabulary. p = teacher, q = student, both as probabilities.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor

from upq.core.registry import Registry
from upq.losses._top_k import Coarse, TopK


class ValueAndGrad(NamedTuple):
    value: Tensor  # scalar: sum over the masked tokens, nats
    grad_TV: Tensor  # d value / d student logits, zero where masked out


class Loss(Protocol):
    """Law: 0 at the teacher (unless `uses_teacher` is False), additive over chunks, invariant to logit shifts."""

    Config: type[BaseModel]
    uses_teacher: bool

    def __init__(self, config: Any) -> None: ...

    def __call__(
        self, student_TV: Tensor, teacher: Tensor | TopK | None, target_T: Tensor, mask_T: Tensor
    ) -> ValueAndGrad:
        """`teacher` is its logits (T, V), its likeliest tokens (a `Divergence` takes either), or None for a loss
        without one. `target_T` is the next token of each position; `mask_T` selects the positions that count."""
        ...


LOSSES: Registry[type[Loss]] = Registry("upq.losses", "loss")


class Divergence(Loss):
    """A loss between two distributions. A subclass gives the value and the gradient of each token.

    The teacher may come as its likeliest tokens alone; the loss then counts all others as one.
    """

    uses_teacher = True

    def __call__(
        self, student_TV: Tensor, teacher: Tensor | TopK | None, target_T: Tensor, mask_T: Tensor
    ) -> ValueAndGrad:
        assert teacher is not None
        everything = bool(mask_T.all())
        student, teacher = (student_TV, teacher) if everything else (student_TV[mask_T], teacher[mask_T])
        if isinstance(teacher, TopK):
            coarse = Coarse.of(log_softmax(student), teacher.index_TK)
            value_T, grad_TR = self.per_token(coarse.logq_TR, teacher.logp_TR())
            grad_TV = coarse.spread(grad_TR)
        else:
            value_T, grad_TV = self.of_logits(student, teacher)
        if everything:
            return ValueAndGrad(value_T.sum(), grad_TV)
        scattered_TV = torch.zeros(student_TV.shape, dtype=grad_TV.dtype, device=grad_TV.device)
        scattered_TV[mask_T] = grad_TV
        return ValueAndGrad(value_T.sum(), scattered_TV)

    def of_logits(self, student_TV: Tensor, teacher_TV: Tensor) -> tuple[Tensor, Tensor]:
        """`per_token` of two tensors of logits."""
        return self.per_token(log_softmax(student_TV), log_softmax(teacher_TV))

    @abstractmethod
    def per_token(self, logq_TV: Tensor, logp_TV: Tensor) -> tuple[Tensor, Tensor]:
        """Value (T,) and its gradient (T, V) with respect to the student's logits."""


def log_softmax(logits_TV: Tensor) -> Tensor:
    """At least float32: bf16 log-probabilities are coarser than the divergence of a trained student."""
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    return logits_TV.log_softmax(-1, dtype=dtype)
