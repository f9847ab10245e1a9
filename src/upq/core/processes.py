"""The ranks of one run (torchrun): which rows belong to which rank, sums over all ranks, and shared errors.

The process group is torch.distributed's default one; the caller sets it up. With a single process every method is a
no-op. B = rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from upq.core.errors import UPQError


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `world`. Row r of all rows is row r // world of process r % world.

    Every process must call all methods but `share` and `mine`, in the same order.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"  # of the tensors that the group's backend takes

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.rank == 0

    def share(self, rows_N: Tensor) -> Tensor:
        """This process's rows of all rows; none where there are more processes than rows."""
        return rows_N[self.rank :: self.world]

    def mine(self, index_B: Tensor) -> Tensor:
        """Of the rows at `index_B`, those of this process, as indices into its share."""
        return index_B[index_B % self.world == self.rank] // self.world

    def sum(self, *tensors: Tensor) -> None:
        """All-reduce (sum) each tensor in place. Every process gets the same bits."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def total(self, value: float) -> float:
        """The sum over all processes, in float64."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        self.sum(total)
        return total.item()

    def each(self, value: int) -> list[int]:
        """Every process's value, by rank."""
        values = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        values[self.rank] = value
        self.sum(values)
        return [int(each) for each in values.tolist()]

    def copy(self, *tensors: Tensor) -> None:
        """Broadcast the first process's values into each tensor."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def of_first(self, value: int) -> int:
        """The first process's value."""
        if self.world == 1:
            return value
        sent = torch.tensor(value, device=self.device)
        self.copy(sent)
        return int(sent)

    def text_of_first(self, text: str) -> str:
        """The first process's text."""
        return text if self.world == 1 else self._broadcast_text(text, 0)

    @contextmanager
    def shared_errors(self) -> Iterator[None]:
        """If any rank raises UPQError in this block, every rank raises it at the end: the error of the lowest rank.

        Prevents a hang in the next collective. No other method may be called within.
        """
        error: UPQError | None = None
        try:
            yield
        except UPQError as caught:
            if self.world == 1:
                raise
            error = caught
        if self.world == 1:
            return
        rank = torch.tensor(self.world if error is None else self.rank, device=self.device)
        dist.all_reduce(rank, op=dist.ReduceOp.MIN)
        if rank < self.world:
            raise UPQError(self._broadcast_text(str(error or ""), int(rank))) from error

    def _broadcast_text(self, text: str, rank: int) -> str:
        """The text of process `rank`."""
        raw = list(text.encode()) if self.rank == rank else []
        size = torch.tensor(len(raw), device=self.device)
        dist.broadcast(size, src=rank)
        sent = torch.tensor(raw or [0] * int(size), dtype=torch.uint8, device=self.device)
        dist.broadcast(sent, src=rank)
        return bytes(sent.tolist()).decode()


ALONE = Processes()
