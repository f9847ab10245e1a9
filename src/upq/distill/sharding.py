"""FSDP2 (torch's fully_shard): weights, gradients and moments of the training cut over all processes."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from upq.distill.objective import Objective
from upq.distill.student import Starts, load_student
from upq.model.layout import block_list
from upq.model.sharding import make_mesh, shard_frozen
from upq.model.source import Source


def load_sharded(
    source: Source, solutions: Callable[[int], Starts], *, train_norms: bool, keep: bool = True
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher as `load_student` and `shard` leave them; without `keep`, the teacher has no blocks.

    Beside its shards, a process has embedding, final norm, head and one block whole.
    """
    mesh, originals = make_mesh(source.device.type), list[nn.Module]()

    def cut(block: nn.Module, original: nn.Module) -> None:
        fully_shard(block, mesh=mesh)
        if keep:
            originals.append(shard_frozen(original, mesh))

    student, teacher = load_student(source, solutions, train_norms=train_norms, after=cut)
    for index, original in enumerate(originals):
        block_list(teacher)[index] = original
    return student, teacher


def shard(objective: Objective, device_type: str) -> None:
    """Cut student and teacher over the processes in place, decoder block by decoder block.

    A block is whole in a process only while it computes. Latents stay float32: what is sent is what learns, so the
    codes that a process computes with are those of one process. The teacher's embedding, final norm and head stay
    whole, since no module of its own that could gather them is called. One that is read block by block is in no
    process's memory and stays as it is, and so do blocks that are cut already.
    """
    mesh = make_mesh(device_type)
    for block in block_list(objective.student):
        if not isinstance(block, FSDPModule):
            fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    if isinstance(objective.teacher, PreTrainedModel):
        for block in block_list(objective.teacher):
            if not isinstance(block, FSDPModule):
                shard_frozen(block, mesh)
