"""Rotations of a linear's input that stay at inference, because nothing before it can hold them.

`config.json` of a model that has some names them under `upq_online`: by path of a linear, the width of a Hadamard
matrix that turns each such stretch of the input's channels, and the seed of its signs. The weight holds the inverse, so
the model's function is the original's. What builds the model from its configuration calls `install`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from upq.core.config import Strict, decode
from upq.core.errors import UPQError
from upq.core.hadamard import factors, signs

KEY = "upq_online"  # of config.json
_OURS = "is config.json from this upq?"


class OnlineRotation(Strict):
    """`x · (I ⊗ H·)` with `H = randomised(block, seed)`, or plain Hadamard where there is no seed."""

    block: int
    seed: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Law (tests/test_online.py): x (…, I) times the matrix, whose product of two factors is computed in turn."""
        signs_N, left_AA, right_BB = _parts(self.block, self.seed)
        parts = x.float().reshape(*x.shape[:-1], -1, self.block) * signs_N.to(x.device)
        parts = parts.reshape(*parts.shape[:-1], len(left_AA), len(right_BB))
        turned: Tensor = left_AA.to(x.device).T @ (parts @ right_BB.to(x.device))
        return turned.reshape(x.shape).to(x.dtype)


def online(config: Any) -> dict[str, OnlineRotation]:
    """What a configuration names, by path of a linear."""
    raw = getattr(config, KEY, None) or {}
    if not isinstance(raw, Mapping):
        raise UPQError(f"config.json: {KEY}: expected rotations by module path, got {raw!r}; {_OURS}")
    return {path: decode(OnlineRotation, each, f"config.json: {KEY}.{path}") for path, each in raw.items()}


def install(model: nn.Module, config: Any) -> None:
    """Let the linears of `model` turn their inputs, those that do not yet. Raises UPQError where one cannot."""
    rotations = online(config)
    modules = dict(model.named_modules()) if rotations else {}
    for path, rotation in rotations.items():
        width = _inputs(modules.get(path))
        if width is None or not 2 <= rotation.block <= width or width % rotation.block:
            what = "is no linear" if width is None else f"has {width} inputs, no multiple of block={rotation.block}"
            raise UPQError(f"config.json: {KEY}.{path}: {what}; {_OURS}")
        _parts(rotation.block, rotation.seed)  # raises where no such matrix is known
        rotate_input(modules[path], rotation)


def _inputs(module: nn.Module | None) -> int | None:
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0])
    found = getattr(module, "in_features", getattr(module, "columns", None))
    return found if isinstance(found, int) else None


def rotate_input(linear: nn.Module, rotation: OnlineRotation) -> None:
    """From here on `linear` turns its input, before anything else happens to it."""
    if rotation_of(linear) is None:
        linear.register_forward_pre_hook(_Hook(rotation), prepend=True)


def rotation_of(linear: nn.Module) -> OnlineRotation | None:
    hooks = (hook for hook in linear._forward_pre_hooks.values() if isinstance(hook, _Hook))
    return next((hook.rotation for hook in hooks), None)


class _Hook:
    def __init__(self, rotation: OnlineRotation) -> None:
        self.rotation = rotation

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.rotation(args[0]), *args[1:])


@cache
def _parts(block: int, seed: int | None) -> tuple[Tensor, Tensor, Tensor]:
    with torch.device("cpu"):  # models without memory are built in a context of another
        left_AA, right_BB = factors(block)
        of_rows = torch.ones(block, 1) if seed is None else signs(block, seed)
        return of_rows[:, 0].float(), left_AA.float(), right_BB.float()
