"""Continuations of one context against each text computed whole."""

from __future__ import annotations

import pytest
import torch

from tiny import tiny_model
from upq.evals.choices import score
from zoo import random_model

CONTEXTS = torch.tensor([[5, 9, 2, 40, 41, 7, 8, 9, 12], [6, 6, 1, 3, 50, 51, 52, 2, 30]])
CONTINUATIONS = [[[7], [8, 9, 10], [8, 11]], [[20, 21], [22]]]


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("gemma3", {"sliding_window": 4}), ("qwen3", {})])
def test_scores_are_those_of_whole_texts(family: str, options: dict[str, int]) -> None:
    model = (random_model(family, **options) if options else tiny_model(family)).eval()
    likeliest = model(CONTEXTS[:1]).logits[0, -1].argmax().item()
    continuations = [[*CONTINUATIONS[0], [likeliest]], CONTINUATIONS[1]]
    found = score(model, CONTEXTS, continuations)
    assert found is not None
    for context, texts, scores in zip(CONTEXTS.tolist(), continuations, found, strict=True):
        for text, (logp, is_likeliest) in zip(texts, scores, strict=True):
            with torch.no_grad():
                logp_TV = model(torch.tensor([context + text])).logits[0, len(context) - 1 : -1].log_softmax(-1)
            wanted = logp_TV.gather(1, torch.tensor(text)[:, None]).sum().item()
            assert logp == pytest.approx(wanted, abs=1e-5)
            assert is_likeliest == (logp_TV.argmax(1).tolist() == text)
    assert found[0][-1][1]


def test_a_cache_that_cannot_branch_is_told() -> None:
    """A state-space layer's state is of one row."""
    assert score(random_model("lfm2").eval(), CONTEXTS, CONTINUATIONS) is None
