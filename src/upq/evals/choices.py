"""Log-likelihoods of several continuations of one context, which is computed once.

Shape suffixes: B = contexts of a batch, T = tokens of a context, R = continuations of all of them, C = tokens of the
longest continuation, V = vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from upq.model.cache import cache_name

_BRANCHING = (DynamicLayer, DynamicSlidingWindowLayer)  # keys and values of positions: each row can be had twice

Scored = tuple[float, bool]  # sum of log-probabilities; whether each token is the likeliest


@torch.inference_mode()
def score(
    model: PreTrainedModel, contexts_BT: Tensor, continuations: Sequence[Sequence[Sequence[int]]]
) -> list[list[Scored]] | None:
    """Of each context its continuations' scores, or None where the model's cache cannot branch (state-space layers).

    Contexts are of one length, so nothing is padded on the left; continuations are padded on the right, which no
    token before sees. Law (tests/test_evals_choices.py): up to rounding, the scores of each text computed whole.
    """
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    read = model(input_ids=contexts_BT.to(model.device), use_cache=True, **last)
    name = cache_name(model.forward) or ""
    cache = read.get(name)
    if not isinstance(cache, Cache) or any(type(layer) not in _BRANCHING for layer in cache.layers):
        return None
    rows = [(number, row) for number, group in enumerate(continuations) for row in group]
    context_R = torch.tensor([number for number, _ in rows], device=model.device)
    first_RV = read.logits[:, -1].float().log_softmax(-1)[context_R]
    longest = max(len(row) for _, row in rows)
    tokens_RC = torch.tensor([[*row, *[0] * (longest - len(row))] for _, row in rows], device=model.device)
    logp_RC = torch.zeros(tokens_RC.shape, device=model.device)
    likeliest_RC = torch.ones_like(tokens_RC, dtype=torch.bool)
    logp_RC[:, 0] = first_RV.gather(1, tokens_RC[:, :1])[:, 0]
    likeliest_RC[:, 0] = first_RV.argmax(1) == tokens_RC[:, 0]
    if longest > 1:
        cache.batch_select_indices(context_R)
        logits = model(input_ids=tokens_RC[:, :-1], **{name: cache}, use_cache=True).logits
        later = torch.tensor([[i < len(row) for i in range(1, longest)] for _, row in rows], device=model.device)
        token_N = tokens_RC[:, 1:][later]
        logp_NV = logits[later].float().log_softmax(-1)  # N = tokens that count, so not of padding
        logp_RC[:, 1:][later] = logp_NV.gather(1, token_N[:, None])[:, 0]
        likeliest_RC[:, 1:][later] = logp_NV.argmax(1) == token_N
    scores = list(zip(logp_RC.sum(1).tolist(), likeliest_RC.all(1).tolist(), strict=True))
    found: list[list[Any]] = [[] for _ in continuations]
    for (number, _), scored in zip(rows, scores, strict=True):
        found[number].append(scored)
    return found
