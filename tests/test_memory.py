"""What a process holds, and what it can give back."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tiny import tiny_model
from upq.core.memory import on_huge_pages, page_out, resident_bytes, trim
from upq.kernels import Weight
from upq.model.loading import load_model

SIZE = 2**26
linux = pytest.mark.skipif(sys.platform != "linux", reason="the system gives nothing back when asked")


def from_file(folder: Path, tensor: torch.Tensor) -> torch.Tensor:
    save_file({"x": tensor}, folder / "x.safetensors")
    with safe_open(folder / "x.safetensors", framework="pt") as file:
        return file.get_tensor("x")


@linux
def test_pages_of_a_file_go_and_come_back(tmp_path: Path) -> None:
    numbers = torch.arange(SIZE // 8)
    mapped = from_file(tmp_path, numbers)
    assert torch.equal(mapped, numbers)
    held = resident_bytes()
    page_out(mapped)
    assert resident_bytes() < held - 0.9 * SIZE
    assert torch.equal(mapped, numbers)


@pytest.mark.parametrize("size", [1, 4095, 4096, 100_000])
def test_memory_of_its_own_keeps_its_values(size: int) -> None:
    numbers = torch.randint(256, (size,), dtype=torch.uint8)
    expected = numbers.clone()
    page_out(numbers)
    assert torch.equal(numbers, expected)


@linux
def test_a_rearranged_weight_is_in_memory_once(tmp_path: Path) -> None:
    codes_OB = from_file(tmp_path, torch.randint(256, (2**13, 2**13), dtype=torch.uint8))
    weight = Weight(codes_OB, torch.ones(2**13, 1).half(), 1.5, bits=2, in_features=2**15)
    before = resident_bytes()
    assert weight.matrix().nbytes >= SIZE
    assert resident_bytes() - before < 1.15 * SIZE


@linux
def test_small_weights_share_pages_and_give_them_back() -> None:
    """What 2 MB hold is less than a huge page; with the last of its neighbours it goes."""
    codes_OB, scale_O1 = torch.randint(256, (512, 512), dtype=torch.uint8), torch.ones(512, 1).half()
    weights = [Weight(codes_OB, scale_O1, 1.5, bits=2, in_features=2048) for _ in range(200)]
    before = resident_bytes()
    held = sum(weight.matrix().nbytes for weight in weights)
    assert 0.9 * held < resident_bytes() - before < 1.15 * held + 2**24
    unpacked = [weight.matrix() for weight in weights[::50]]
    del weights
    assert resident_bytes() - before < len(unpacked) * 2**23 + 2**22
    del unpacked
    assert resident_bytes() - before < 2**22


@linux
def test_room_between_what_is_still_there_goes_back() -> None:
    torch.ones(2**22)  # once a block of 16 MB has gone, blocks of up to that size come from the heap
    trim()
    before = resident_bytes()
    blocks = [torch.ones(2**17) for _ in range(256)]
    held = resident_bytes() - before
    del blocks[:-1]
    trim()
    assert held > 0.9 * 2**27
    assert resident_bytes() - before < 0.1 * held


def test_a_model_is_read_by_the_thread_that_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.core_model_loading.ThreadPoolExecutor", None)
    load_model(tmp_path)
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


@pytest.mark.parametrize("size", [1, 8, 9, 5_000_000])
def test_a_ruler_is_as_long_as_asked(size: int) -> None:
    ruler = on_huge_pages(size)
    assert size <= ruler.nbytes < size + 8
    assert int(ruler.sum()) == len(ruler)
