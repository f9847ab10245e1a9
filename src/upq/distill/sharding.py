"""FSDP2 (torch's fully_shard): weights, gradients and moments of the training cut over all processes."""

from __future__ import annotations

from collections.abc import Callable

from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from upq.distill.objective import Objective
from upq.distill.student import make_student, make_student_block
from upq.nn.fake_quant import Solution
from upq.sharding import blocks, fill, make_mesh, shard_frozen
from upq.streaming import StreamedModel


def load_sharded(
    model: StreamedModel, solutions: Callable[[int], dict[str, Solution]], *, train_norms: bool
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher as `make_student` and `shard` leave them, read from the disk one decoder block at a time.

    `solutions` gives those of a block, by the names of its linears. Beside its shards, a process has embedding, final
    norm, head and one block whole.
    """
    mesh, teacher = make_mesh(model.device.type), model.frame()
    student = make_student(teacher, {}, train_norms=train_norms)
    students = blocks(student)
    for index, original in fill(teacher, model, mesh):
        students[index] = make_student_block(original, solutions(index), train_norms=train_norms)
        fully_shard(students[index], mesh=mesh)
    return student, teacher


def shard(objective: Objective, device_type: str) -> None:
    """Cut student and teacher over the processes in place, decoder block by decoder block.

    A block is whole in a process only while it computes. Latents stay float32: what is sent is what learns, so the
    codes that a process computes with are those of one process. The teacher's embedding, final norm and head stay
    whole, since no module of its own that could gather them is called. One that is read block by block is in no
    process's memory and stays as it is, and so do blocks that are cut already.
    """
    mesh = make_mesh(device_type)
    for block in blocks(objective.student):
        if not isinstance(block, FSDPModule):
            fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    if isinstance(objective.teacher, PreTrainedModel):
        for block in blocks(objective.teacher):
            if not isinstance(block, FSDPModule):
                shard_frozen(block, mesh)
