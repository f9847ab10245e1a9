"""FSDP2 (torch's fully_shard): weights, gradients and moments of the training cut over all processes."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from upq.distill.objective import Objective
from upq.distill.student import make_student, make_student_block
from upq.loading import family
from upq.nn.fake_quant import Solution
from upq.streaming import StreamedModel


def load_sharded(
    model: StreamedModel, solutions: Callable[[int], dict[str, Solution]], *, train_norms: bool
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher as `make_student` and `shard` leave them, read from the disk one decoder block at a time.

    `solutions` gives those of a block, by the names of its linears. Beside its shards, a process has embedding, final
    norm, head and one block whole.
    """
    mesh, teacher = _mesh(model.device.type), model.frame()
    student = make_student(teacher, {}, train_norms=train_norms)
    students, teachers = _blocks(student), _blocks(teacher)
    for index in range(len(model)):
        original = model.block(index)
        students[index] = make_student_block(original, solutions(index), train_norms=train_norms)
        teachers[index] = original
        fully_shard(students[index], mesh=mesh)
        _shard_teacher(original, mesh)
    return student, teacher


def shard(objective: Objective, device_type: str) -> None:
    """Cut student and teacher over the processes in place, decoder block by decoder block.

    A block is whole in a process only while it computes. Latents stay float32: what is sent is what learns, so the
    codes that a process computes with are those of one process. The teacher's embedding, final norm and head stay
    whole, since no module of its own that could gather them is called. One that is read block by block is in no
    process's memory and stays as it is, and so do blocks that are cut already.
    """
    mesh = _mesh(device_type)
    for block in _blocks(objective.student):
        if not isinstance(block, FSDPModule):
            fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    if isinstance(objective.teacher, PreTrainedModel):
        for block in _blocks(objective.teacher):
            if not isinstance(block, FSDPModule):
                _shard_teacher(block, mesh)


def _shard_teacher(block: nn.Module, mesh: DeviceMesh) -> None:
    # Each of its blocks is a root of its own, and a root would stay whole after its first forward pass.
    fully_shard(block, mesh=mesh, reshard_after_forward=True)


def _mesh(device_type: str) -> DeviceMesh:
    return init_device_mesh(device_type, (dist.get_world_size(),))


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    blocks = model.get_submodule(family(model.config).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks
