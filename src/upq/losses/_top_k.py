"""The k likeliest tokens of a distribution, and the probability of all others together.

A divergence between two distributions whose rare tokens are counted as one is never above the full one (the data
processing inequality), and at k = V it is the full one. Laws: tests/test_losses.py.

Shape suffixes: T = tokens, V = vocabulary, K = tokens kept, R = K + 1: those and the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Log-probability of an empty rest, where -inf would give 0·(inf - inf). exp of it is 0, and float16 can hold it.
FLOOR = -1e4


@dataclass(frozen=True, slots=True)
class TopK:
    """Log-probabilities of the teacher, the rare tokens as one. `__getitem__` picks tokens, as of a tensor."""

    index_TK: Tensor  # int64
    logp_TK: Tensor
    rest_T: Tensor  # log of the probability of all other tokens together

    @classmethod
    def of(cls, logp_TV: Tensor, k: int) -> TopK:
        kept = logp_TV.topk(k)
        rest_T = _outside(logp_TV, kept.indices).logsumexp(-1)
        return cls(kept.indices, kept.values.clamp_min(FLOOR), rest_T.clamp_min(FLOOR))

    def __getitem__(self, at: slice | Tensor) -> TopK:
        return TopK(self.index_TK[at], self.logp_TK[at], self.rest_T[at])

    def to(self, device: torch.device) -> TopK:
        return TopK(self.index_TK.to(device), self.logp_TK.to(device), self.rest_T.to(device))

    def logp_TR(self) -> Tensor:
        """The kept tokens and the rest, normalised: storage in 16 bits has rounded them."""
        return torch.cat([self.logp_TK, self.rest_T[:, None]], -1).log_softmax(-1)


def _outside(logp_TV: Tensor, index_TK: Tensor) -> Tensor:
    """A copy with -inf for the tokens of `index_TK`."""
    return logp_TV.scatter(-1, index_TK, -torch.inf)


@dataclass(frozen=True, slots=True)
class Coarse:
    """The student's log-probabilities, seen through the teacher's choice of tokens."""

    index_TK: Tensor
    logq_TR: Tensor
    outside_TV: Tensor  # log-probabilities, -inf at the kept tokens

    @classmethod
    def of(cls, logq_TV: Tensor, index_TK: Tensor) -> Coarse:
        outside_TV = _outside(logq_TV, index_TK)
        rest_T = outside_TV.logsumexp(-1).clamp_min(FLOOR)
        return cls(index_TK, torch.cat([logq_TV.gather(-1, index_TK), rest_T[:, None]], -1), outside_TV)

    def spread(self, grad_TR: Tensor) -> Tensor:
        """Turn a gradient with respect to the logits of the R outcomes into one with respect to those of all V tokens.

        The log-probabilities of the outcomes are logits too: z of a kept token, and the logsumexp of the logits of the
        rest. The derivative of that logsumexp is each token's share of the rest.
        """
        share_TV = (self.outside_TV - self.logq_TR[:, -1:]).exp_()
        return share_TV.mul_(grad_TR[:, -1:]).scatter_(-1, self.index_TK, grad_TR[:, :-1])
