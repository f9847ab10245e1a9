"""Quantised keys and values: rounded where attention reads them, keys behind their rotary positions.

Each head's vector of a token is rounded by itself, so what a cache holds rounded and what is rounded at every reading
are the same numbers. Nothing is packed: a cache takes the bytes that it took.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from upq.core.act_scheme import ActScheme
from upq.core.errors import UPQError
from upq.nn.activations import ActQuantiser

_NAME = "upq_kv"  # of the attention, in transformers' registry


class KvQuantiser(ActQuantiser):
    """Stands in an attention as `kv`. `attention` is what that computed before."""

    def __init__(self, scheme: ActScheme, attention: str) -> None:
        super().__init__(scheme)
        self.attention = attention


def attentions(block: nn.Module) -> list[nn.Module]:
    """Modules whose keys and values go through transformers' attention interface, as their forward shows."""
    return [module for module in block.modules() if "config" in vars(module) and _interface(type(module))]


def check_kv(scheme: ActScheme, where: str) -> None:
    """Raises UPQError for a scheme that keys and values cannot have."""
    if scheme.static or scheme.per == "tensor":
        raise UPQError(f"{where}: keys and values have scales of their own for each token; set per=token or per=group")


def attach_kv(block: nn.Module, scheme: ActScheme | None) -> None:
    """From here on every attention of the block reads rounded keys and values."""
    for attention in attentions(block) if scheme is not None else ():
        assert scheme is not None
        config: Any = attention.config
        attention.add_module("kv", KvQuantiser(scheme, str(config._attn_implementation)))
        config = copy.copy(config)  # the model's own is shared, and masks are made by it
        config._attn_implementation_internal = _NAME
        attention.config = config


def _interface(kind: type[nn.Module]) -> bool:
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(kind.forward)
    except (OSError, TypeError):  # it has no source
        return False


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    quantiser = module.kv
    assert isinstance(quantiser, KvQuantiser)
    own: Callable[..., Any] | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get(quantiser.attention, own)
    assert attend is not None
    return attend(module, query, quantiser(key), quantiser(value), *args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
