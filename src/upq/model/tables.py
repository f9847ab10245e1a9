"""Embedding tables that stay on disk: a replay reads the rows that a batch looks up, and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upq.core.errors import UPQError

Mode = Literal["rows", "nan", "zeros"]  # what a look-up gives: the rows, or a stand-in where only the shape counts


class Table:
    """Stands in for an embedding's weight (V, H). Of torch's functions it knows `embedding` alone.

    An embedding's own class goes on computing around the look-up (a scale, an offset of positions).
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, read: Callable[[Tensor], Tensor]
    ) -> None:
        """`read` gives the rows of some ids."""
        self.shape, self.dtype, self.device, self._read = torch.Size(shape), dtype, device, read
        self.mode: Mode = "rows"

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows (…, H). The whole table in float32 would be the largest thing in memory."""
        if self.mode != "rows":
            value = torch.nan if self.mode == "nan" else 0.0
            stand_in = torch.full((1,), value, dtype=self.dtype, device=self.device)
            return stand_in.expand(*ids.shape, *self.shape[1:])
        used_R, places = ids.cpu().unique(return_inverse=True)  # type: ignore[no-untyped-call]
        return F.embedding(places.to(self.device), self._read(used_R).to(self.device))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.embedding:
            name = getattr(function, "__name__", function)
            raise UPQError(f"the model reads its embedding by {name}, and UPQ knows look-ups alone")
        ids = args[0] if args else kwargs["input"]
        table = args[1] if len(args) > 1 else kwargs["weight"]
        return table.look_up(ids)


def put_table(embedding: nn.Embedding, table: Table) -> None:
    """`embedding` looks up in `table` from here on."""
    del embedding._parameters["weight"]
    embedding.__dict__["weight"] = table


def tables(module: nn.Module) -> list[Table]:
    """Those of a replay's decoder."""
    weights = (vars(part).get("weight") for part in module.modules())
    return [weight for weight in weights if isinstance(weight, Table)]


@contextmanager
def looking_up(tables: list[Table], mode: Mode) -> Iterator[None]:
    before = [table.mode for table in tables]
    for table in tables:
        table.mode = mode
    try:
        yield
    finally:
        for table, each in zip(tables, before, strict=True):
            table.mode = each
