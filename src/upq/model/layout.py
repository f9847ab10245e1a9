"""Finds the parts of a model by rule, without a list of families."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def block_list(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks: the largest outermost ModuleList whose members are all gradient-checkpointing layers.

    Law (tests/test_families.py): for the families in upq/model/families it is the list that their description names.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        blocks = isinstance(module, nn.ModuleList) and len(module) and all(map(_is_block, module))
        if blocks and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    return max(lists.values(), key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)
