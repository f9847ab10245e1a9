"""FSDP2 (torch's fully_shard): weights, gradients and moments of the training cut over all processes."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from upq.distill.objective import Objective
from upq.loading import family


def shard(objective: Objective, device_type: str) -> None:
    """Cut student and teacher over the processes in place, decoder block by decoder block.

    A block is whole in a process only while it computes. Latents stay float32: what is sent is what learns, so the
    codes that a process computes with are those of one process. The teacher's embedding, final norm and head stay
    whole, since no module of its own that could gather them is called. One that is read block by block is in no
    process's memory and stays as it is.
    """
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for block in _blocks(objective.student):
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    if isinstance(objective.teacher, PreTrainedModel):
        for block in _blocks(objective.teacher):
            fully_shard(block, mesh=mesh)


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    blocks = model.get_submodule(family(model.config).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks
