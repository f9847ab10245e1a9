"""Activations on disk are those in memory, bit for bit; they take no memory and leave nothing behind."""

from __future__ import annotations

import tempfile
from io import FileIO
from pathlib import Path

import pytest
import torch

from upq.core.errors import UPQError
from upq.core.memory import resident_bytes
from upq.model.activations import OnDisk, allocator, batches

CPU = torch.device("cpu")
SHAPE = torch.Size((7, 5, 3))


def bits(batch_BTH: torch.Tensor) -> torch.Tensor:
    return batch_BTH.contiguous().view(torch.int32)


def test_what_is_read_is_what_was_written(tmp_path: Path, device: str) -> None:
    """Whatever is written in whatever order: rows in a stretch and by index, the last write of a row counts."""
    generator = torch.Generator().manual_seed(0)
    memory_NTH = torch.randn(SHAPE, generator=generator).to(device)
    memory_NTH[0, 0] = torch.tensor([torch.nan, -torch.inf, -0.0])
    memory_NTH[1, 0, 0] = 1e-45  # the smallest float32 there is
    with allocator(tmp_path) as allocate:
        disk_NTH = allocate(SHAPE, torch.device(device))
        disk_NTH[:] = memory_NTH
        for rows in (slice(2, 4), slice(0, 1), slice(6, 9), slice(3, 3)):
            batch_BTH = torch.randn(memory_NTH[rows].shape, generator=generator).to(device)
            memory_NTH[rows] = batch_BTH
            disk_NTH[rows] = batch_BTH.permute(0, 2, 1).contiguous().permute(0, 2, 1)  # the same, strided
        assert disk_NTH.shape == memory_NTH.shape
        assert len(disk_NTH) == len(memory_NTH)
        for rows in (slice(None), slice(1, 5), slice(5, 99), slice(2, 2)):
            assert torch.equal(bits(disk_NTH[rows]), bits(memory_NTH[rows]))
        for at in ([3, 1, 1, 6], [0], []):
            index = torch.tensor(at, dtype=torch.long)
            assert torch.equal(bits(disk_NTH[index]), bits(memory_NTH[index]))


def test_a_batch_is_not_the_store(tmp_path: Path) -> None:
    with allocator(tmp_path) as allocate:
        disk_NTH = allocate(SHAPE, CPU)
        disk_NTH[:] = torch.zeros(SHAPE)
        disk_NTH[:].fill_(1)
        assert not disk_NTH[:].any()


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with allocator(tmp_path) as allocate:
        made = [allocate(SHAPE, CPU), allocate(SHAPE, CPU)]
        for each in made:
            each[:] = torch.ones(SHAPE)
        assert not list(tmp_path.iterdir())  # it has no name: not even kill -9 leaves it
    for each in made:
        with pytest.raises(ValueError, match="closed file"):
            each[:]


def test_the_file_does_not_count_as_memory(tmp_path: Path) -> None:
    rows, row = 64, torch.Size((256, 1024))  # 64 MiB
    batch_BTH = torch.ones((4, *row))
    with allocator(tmp_path) as allocate:
        disk_NTH = allocate(torch.Size((rows, *row)), CPU)
        disk_NTH[:4] = batch_BTH
        disk_NTH[:4].sum()
        before = resident_bytes()
        for at in batches(rows, 4):
            disk_NTH[at] = batch_BTH
        assert sum(disk_NTH[at].sum().item() for at in batches(rows, 4)) == rows * row.numel()
        assert resident_bytes() - before < 32 * 2**20  # two batches are 8 MiB, and the allocator keeps some more


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir, buffering: FileIO("/dev/full", "r+"))
    with pytest.raises(UPQError) as caught, allocator(tmp_path) as allocate:
        allocate(SHAPE, CPU)[:] = torch.ones(SHAPE)
    assert str(caught.value) == (
        f"{tmp_path}: cannot write: no space left on the device; free some space and run the same command again"
    )


def test_a_folder_that_takes_no_files_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UPQError, match=rf"^{tmp_path}/absent: cannot write: No such file or directory; check"):
        OnDisk(tmp_path / "absent", SHAPE, CPU)


def test_batches_are_all_rows_in_order() -> None:
    for rows, size in ((7, 3), (6, 3), (2, 8), (0, 4)):
        assert [row for at in batches(rows, size) for row in range(rows)[at]] == list(range(rows))
        assert all(at.stop - at.start <= size for at in batches(rows, size))
