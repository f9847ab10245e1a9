"""Several processes at one run (torchrun): whose rows are whose, sums over all of them, and one error for all.

The process group is torch.distributed's default one, which the caller has set up. A single process needs none: nothing
here then does anything. B = rows of a batch.
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

    All methods but `share` and `mine` are to be called by every process, in the same order.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"  # of the tensors that the group's backend takes

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, rows_N: Tensor) -> Tensor:
        """This process's of all rows; none where there are more processes than rows."""
        return rows_N[self.rank :: self.world]

    def mine(self, index_B: Tensor) -> Tensor:
        """Of the rows at `index_B`, those of this process, as indices into its share."""
        return index_B[index_B % self.world == self.rank] // self.world

    def sum(self, *tensors: Tensor) -> None:
        """Put each tensor's sum over all processes in its place: in all of them the same bits."""
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
        """Put the first process's values into each tensor."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def of_first(self, value: int) -> int:
        """The first process's value."""
        if self.world == 1:
            return value
        told = torch.tensor(value, device=self.device)
        self.copy(told)
        return int(told)

    @contextmanager
    def shared_errors(self) -> Iterator[None]:
        """An UPQError within is raised by all processes at its end, so that none waits for one that has left.

        No other method may be called within. Of several errors it is the lowest rank's.
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
            raise UPQError(self._told(str(error or ""), int(rank))) from error

    def _told(self, text: str, rank: int) -> str:
        """What process `rank` says."""
        raw = list(text.encode()) if self.rank == rank else []
        size = torch.tensor(len(raw), device=self.device)
        dist.broadcast(size, src=rank)
        told = torch.tensor(raw or [0] * int(size), dtype=torch.uint8, device=self.device)
        dist.broadcast(told, src=rank)
        return bytes(told.tolist()).decode()


ALONE = Processes()
