"""Memory of this process: how much it uses and used, and how to return it to the system."""

from __future__ import annotations

import ctypes
import gc
import mmap
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

_STATUS = Path("/proc/self/status")
_MADV_PAGEOUT = 21  # Linux 5.4


def peak_memory_bytes() -> int:
    """Largest resident size so far."""
    # ru_maxrss starts out as that of the process that started this one: 693 MB were shown in place of 374 MB.
    if (found := _status("VmHWM")) is not None:
        return found
    # kibibytes on Linux, bytes on macOS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident size now, pages of mapped files included; the largest so far on systems without /proc."""
    found = _status("VmRSS")
    return peak_memory_bytes() if found is None else found


def give_back() -> None:
    """Collect reference cycles, and trim."""
    gc.collect()  # a block that is checkpointed refers to itself, and with it the student to its latents
    trim()


def trim() -> None:
    """Return freed memory that glibc keeps to the system.

    glibc keeps blocks of up to 32 MB: 261 MB of 831 after a run of a model of 8 million weights. Larger blocks go into
    the room that those left: a training of width 1024 leaves 1.1 GB free, and later tensors of 134 MB are put there.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(0)


def on_huge_pages(nbytes: int) -> Tensor:
    """At least `nbytes` of ones (int64), on huge pages where the system has them: memory to time a plain read.

    With `transparent_hugepage: madvise` malloc's memory is on small pages: its sum ran at 19 GB/s, this one's at 33.
    """
    held = mmap.mmap(-1, nbytes + 8, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        held.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(held, dtype=torch.int64, count=-(-nbytes // 8)).fill_(1)


def page_out(tensor: Tensor) -> None:
    """Give the pages of a tensor that will hardly be read again to the system. Its values stay.

    Pages of a mapped file are read from the file again on access. Systems without this call do nothing.
    """
    if sys.platform == "linux" and tensor.device.type == "cpu":
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_PAGEOUT)


def _status(key: str) -> int | None:
    if not _STATUS.is_file():
        return None
    lines = _STATUS.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
