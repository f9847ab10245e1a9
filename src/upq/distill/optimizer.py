"""The optimiser, and its state as plain tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from upq.core.errors import UPQError
from upq.distill.config import TrainingSettings


def make_optimizer(
    config: TrainingSettings, groups: list[dict[str, Any]], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW with moments in float32 (8 bytes a weight) or, block by block of 256, in 8 bits (2 bytes)."""
    betas = (0.9, config.beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=betas, weight_decay=0.0, fused=True)
    cls = _adamw8bit(device)
    optimizer: torch.optim.Optimizer = cls(groups, betas=betas, weight_decay=0.0)
    return optimizer


def check(config: TrainingSettings) -> None:
    """An optimiser that is not installed is an error, before any work."""
    if config.optimizer == "adamw8bit":
        _adamw8bit(torch.device("cpu"))


def set_rate(group: dict[str, Any], rate: float) -> None:
    """torchao keeps the rate of a group as a tensor, which stays the same one."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def plain(key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A moment as tensors that a safetensors file can hold: itself, or its codes and scales."""
    if not is_traceable_wrapper_subclass(value):
        yield key, value
        return
    names, _ = value.__tensor_flatten__()
    for name in names:
        yield f"{key}.{name}", getattr(value, name)


def restored(key: str, form: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The moment whose `plain` tensors these are; `form` is one of the same kind."""
    if not is_traceable_wrapper_subclass(form):
        return tensors[key]
    names, about = form.__tensor_flatten__()
    parts = {name: tensors[f"{key}.{name}"] for name in names}
    value: Tensor = type(form).__tensor_unflatten__(parts, about, form.shape, form.stride())
    return value


def _adamw8bit(device: torch.device) -> Any:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UPQError("distill.optimizer=adamw8bit needs torchao; pip install 'upq[train]'") from error

    class OnCpu(AdamW8bit):  # type: ignore[misc]
        """Without the compiler that torchao calls: it takes longer than a small model's training."""

        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return OnCpu if device.type == "cpu" else AdamW8bit
