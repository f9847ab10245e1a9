"""What each token's error counts for, and which tokens have massive states.

Many models give the first token of a text, and a few delimiters, a hidden state a hundred times as large as the others
(massive activations, arXiv 2402.17762), which attention rests on (attention sinks, arXiv 2309.17453). A squared error
sees nothing else, a mean of relative errors sees one token in 256.

Shape suffixes: N rows, T tokens, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from upq.core.processes import Processes
from upq.model.activations import Activations, batches

# Times the geometric mean of all norms. SmolLM2-135M's sinks have 170 of it, its other tokens up to 11.
MASSIVE = 20.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of one block, on this process's rows. A token's size is the mean square of its target, or of its input if larger.

    Where a block takes a massive state back, the error is what is left of the input: over a target 500 times smaller,
    as in SmolLM2-135M's last block, it would outweigh all other tokens.
    """

    relative_NT: Tensor  # 1 over a token's size: makes its squared error relative
    massive_NT: Tensor  # bool
    massive: int  # how many there are, over all processes
    count: int  # of all tokens
    usual: float  # the geometric mean of all norms
    # How many times a massive token's relative error counts: all of them count as much as all others. Where they are
    # rarer than one in a row, as if they were not: a batch that happens to have one must not be about nothing else.
    balance: float

    @property
    def weights_NT(self) -> Tensor:
        return torch.where(self.massive_NT, self.balance * self.relative_NT, self.relative_NT)


@torch.no_grad()
def tokens_of(targets_NTH: Activations, inputs_NTH: Activations, processes: Processes, batch_size: int = 8) -> Tokens:
    """Over the rows of all processes, each of which must call this."""
    parts = [
        torch.maximum(*(states[rows].flatten(2).square().mean(-1) for states in (targets_NTH, inputs_NTH)))
        for rows in batches(len(targets_NTH), batch_size)
    ]
    size_NT = torch.cat(parts) if parts else torch.zeros(0, targets_NTH.shape[1])
    count = int(processes.total(size_NT.numel()))
    mean = processes.total(size_NT.double().sum().item()) / count
    some = size_NT[size_NT > 0].double()  # a token of zeros has no logarithm
    logs = processes.total(some.log().sum().item()) / 2
    usual = logs / max(1.0, processes.total(some.numel()))
    massive_NT = size_NT > (MASSIVE**2) * math.exp(2 * usual)
    massive = int(processes.total(int(massive_NT.sum())))
    balance = min((count - massive) / massive, float(size_NT.shape[1])) if massive else 1.0
    # A token of zeros must not outweigh the rest.
    floor = 1e-6 * mean + torch.finfo(torch.float32).tiny
    norm = math.exp(usual) * targets_NTH.shape[2:].numel() ** 0.5
    return Tokens(1 / (size_NT + floor), massive_NT, massive, count, norm, balance)
