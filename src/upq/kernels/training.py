"""What a training on the CPU does beside its products, compiled: each in one pass over memory (cpu/training.hpp).

In torch these are a dozen passes: of SmolLM2-135M's training steps in bfloat16, 17 % of the time were SEQ's and 22 %
the divergence's (docs/log/cost.md). A caller asks `takes` and goes on in torch where it does not: on other devices, for
shards, without the compiled module, and under UPQ_KERNELS=reference.

Laws (tests/test_kernels_training.py): fake weights and their gradients are torch's bit for bit, but for sums, which are
as near to float64's; the divergence obeys the laws of the losses.

Shape suffixes: O = rows, G = groups in a row, S = weights in a group, T = tokens, V = vocabulary.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from upq.core.errors import UPQError
from upq.kernels import compute, cpu


def takes(*tensors: Tensor) -> bool:
    """Whether the compiled functions take them: plain contiguous float32 on the CPU."""
    return all(_plain(tensor, torch.float32) for tensor in tensors) and available()


def takes_logits(*logits_TV: Tensor) -> bool:
    """The same of logits, which may be bfloat16."""
    return all(_plain(each, torch.float32, torch.bfloat16) for each in logits_TV) and available()


def _plain(tensor: Tensor, *dtypes: torch.dtype) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_cpu
        and tensor.dtype in dtypes
        and tensor.is_contiguous()
    )


def available() -> bool:
    """Whether there are compiled functions, and they are wanted."""
    return compute() != "reference" and _there()


@cache
def _there() -> bool:
    try:
        cpu.extension()
    except UPQError:
        return False
    return True


def fake_seq(w_OGS: Tensor, scale_OG: Tensor, n: int) -> Tensor:
    """`scale · (floor(w / scale) + ½)`, clipped to 2n levels (upq.grids.seq)."""
    fake_OGS = torch.empty_like(w_OGS)
    size = w_OGS.shape[-1]
    cpu.extension().fake_seq(
        w_OGS.data_ptr(), scale_OG.data_ptr(), scale_OG.numel(), size, n, fake_OGS.data_ptr(), *_how()
    )
    return fake_OGS


def seq_gradient(
    grad_OGS: Tensor, w_OGS: Tensor, scale_OG: Tensor, n: int, *, bound: float, factor: float
) -> tuple[Tensor, Tensor]:
    """Straight-through gradients of `fake_seq`.

    Of w: 0 where |w / scale| ≥ `bound`. Of Δ = n · scale, times `factor`.
    """
    d_w_OGS, d_delta_OG = torch.empty_like(w_OGS), torch.empty_like(scale_OG)
    given = (grad_OGS.data_ptr(), w_OGS.data_ptr(), scale_OG.data_ptr(), scale_OG.numel(), w_OGS.shape[-1])
    cpu.extension().seq_gradient(*given, n, bound, factor, d_w_OGS.data_ptr(), d_delta_OG.data_ptr(), *_how())
    return d_w_OGS, d_delta_OG


def gjs(student_TV: Tensor, teacher_TV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Value (T,) in nats and gradient (T, V), both float32, of the divergence of each token (upq.losses.gjs)."""
    tokens, vocabulary = student_TV.shape
    value_T, grad_TV = torch.empty(tokens), torch.empty(tokens, vocabulary)
    logits = [(each.data_ptr(), cpu.real(each.dtype)) for each in (student_TV, teacher_TV)]
    outputs = (value_T.data_ptr(), grad_TV.data_ptr())
    cpu.extension().gjs(*logits[0], *logits[1], tokens, vocabulary, beta, *outputs, *_how())
    return value_T, grad_TV


def _how() -> tuple[int, int]:
    return torch.get_num_threads(), cpu.isa(cpu.instruction_set())
