"""Logits of hidden states: the head, and what a family does to its product (a scale, a soft cap)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from upq.model.layout import Layout, layout_of


class Head:
    """What a causal LM makes of its decoder's output, by its own forward: the decoder is left out of it.

    Law (tests/test_walker.py): of the decoder's last hidden states it gives the model's logits, bit for bit.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout | None = None) -> None:
        path = (layout or layout_of(model)).decoder.split(".")
        self._model = model
        self._decoders = [model.get_submodule(".".join(path[:end])) for end in range(1, len(path) + 1)]

    def __call__(self, hidden_TH: Tensor) -> Tensor:
        """Logits (T, V), differentiable."""
        out = _Output(last_hidden_state=hidden_TH[None])
        ids_1T = torch.zeros(1, len(hidden_TH), dtype=torch.long, device=hidden_TH.device)
        with _returning(self._decoders, out):
            logits_1TV: Tensor = self._model(input_ids=ids_1T, use_cache=False).logits
        return logits_1TV[0]


class _Output(BaseModelOutputWithPast):
    """A decoder's output of which only the last hidden states are known."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@contextmanager
def _returning(modules: list[nn.Module], out: Any) -> Iterator[None]:
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = lambda *_args, **_kwargs: out
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward
