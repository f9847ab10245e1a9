"""Hidden states of the calibration rows: a tensor, or a file where they would be most of the memory.

Shape suffixes: N rows, T tokens, H hidden size, B rows of a batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from upq.files.atomic import write_errors


class Activations(Protocol):
    """Rows (N, T, H) in float32 that are read and written a batch at a time; a tensor is one.

    Law (tests/test_activations.py): what is read is what was written, bit for bit, wherever it lies.
    """

    @property
    def shape(self) -> torch.Size: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor:
        """A batch (B, T, H): rows in a stretch, or by their indices (B,)."""
        ...

    def __setitem__(self, rows: slice, batch_BTH: Tensor, /) -> None: ...


Allocate = Callable[[torch.Size, torch.device], Activations]


def in_memory(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.empty(shape, device=device)


@contextmanager
def allocator(folder: Path | None) -> Iterator[Allocate]:
    """Gives room for activations: in files below `folder`, or on the device itself where that is None.

    The files go when the context ends.
    """
    with ExitStack() as files:

        def allocate(shape: torch.Size, device: torch.device) -> Activations:
            if folder is None:
                return in_memory(shape, device)
            on_disk = OnDisk(folder, shape, device)
            files.callback(on_disk.close)
            return on_disk

        yield allocate


class OnDisk:
    """Activations in a file. Raises UPQError where the disk is full.

    Read and written and not mapped: pages of a map count as this process's memory once they have been touched.
    """

    def __init__(self, folder: Path, shape: torch.Size, device: torch.device) -> None:
        self.shape = shape
        self._folder, self._device = folder, device
        self._row_bytes = shape[1:].numel() * torch.float32.itemsize
        with write_errors(folder):
            # A file without a name: no end of the process, kill -9 included, leaves it behind. Without a buffer, a
            # write that fails does so here and not once more when the file is closed.
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (`close` ends it)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor:
        wanted = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        batch_BTH = torch.empty((len(wanted), *self.shape[1:]))
        for row, row_TH in zip(wanted, batch_BTH, strict=True):
            self._file.seek(row * self._row_bytes)
            left = memoryview(row_TH.numpy()).cast("B")
            while left:
                read = self._file.readinto(left)
                assert read, f"row {row} was never written"
                left = left[read:]
        return batch_BTH.to(self._device)

    def __setitem__(self, rows: slice, batch_BTH: Tensor, /) -> None:
        batch_BTH = batch_BTH.detach().cpu().contiguous()
        assert batch_BTH.dtype == torch.float32
        assert batch_BTH.shape[1:] == self.shape[1:]
        with write_errors(self._folder):
            for row, row_TH in zip(range(len(self))[rows], batch_BTH, strict=True):
                self._file.seek(row * self._row_bytes)
                left = memoryview(row_TH.numpy()).cast("B")
                while left:
                    left = left[self._file.write(left) :]

    def close(self) -> None:
        self._file.close()


def batches(rows: int, size: int) -> Iterator[slice]:
    """All rows in order, `size` at a time; the last stretch may be shorter."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
