"""FSDP2 (torch's fully_shard) of a frozen model: its decoder blocks cut over all processes, whole one at a time."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from upq.core.memory import trim
from upq.model.source import Source


def load_original(source: Source, mesh: DeviceMesh) -> PreTrainedModel:
    """The whole model in the values of `load_model`, but for `generation_config`, which it has from its config alone.

    Beside its shards, a process has embedding, final norm, head and one block whole. Nothing here waits for other
    processes; a forward pass does, at each block.
    """
    whole = source.without_blocks()
    source.fill_blocks(whole, lambda _, block: shard_frozen(block, mesh))
    return whole


def shard_frozen(block: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Cut a decoder block that is never trained, in place. Returns it."""
    # Each is a root of its own, and a root would stay whole after its first forward pass.
    fully_shard(block, mesh=mesh, reshard_after_forward=True)
    block.register_forward_hook(_forget)
    return block


def _forget(block: nn.Module, *_: object) -> None:
    assert isinstance(block, FSDPModule)
    block.reset_iter_state()  # each pass is noted, in 50 bytes, for a backward pass that never comes
    if next(block.parameters()).device.type == "cpu":
        # What comes and goes are matrices of a few MB, and what stays lies between them: of 8 blocks of 61 MB, 2 whole
        # at a time, glibc kept 800 MB.
        trim()


def make_mesh(device_type: str) -> DeviceMesh:
    """Of all processes, which may have to meet for it."""
    return init_device_mesh(device_type, (dist.get_world_size(),))
