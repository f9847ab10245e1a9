"""How much memory this process needs and has needed."""

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
    """Resident size now, pages of mapped files included; where the system does not tell, the largest so far."""
    found = _status("VmRSS")
    return peak_memory_bytes() if found is None else found


def give_back() -> None:
    """Free what only circles of objects hold, and trim."""
    gc.collect()  # a block that is checkpointed refers to itself, and with it the student to its latents
    trim()


def trim() -> None:
    """Return to the system what glibc keeps of freed memory.

    Of blocks of up to 32 MB all: after a run of a model of 8 million weights 261 MB of 831. And of any size where such
    blocks have left room: a training of width 1024 leaves 1.1 GB, empty, from which later tensors of 134 MB are taken.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(0)


def on_huge_pages(nbytes: int) -> Tensor:
    """Ones of int64 that take `nbytes` at least, on huge pages where the system has them: the ruler of a plain read.

    Memory of malloc's is not, where huge pages are for those that ask: its sum was read at 19 GB/s, this at 33.
    """
    held = mmap.mmap(-1, nbytes + 8, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        held.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(held, dtype=torch.int64, count=-(-nbytes // 8)).fill_(1)


def page_out(tensor: Tensor) -> None:
    """Let the system have the pages of a tensor that will hardly be read again; its values stay what they are.

    Those of a mapped file are read anew where they are asked for. A wish: systems that do not know it do nothing.
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
