"""Which products are in bfloat16, and that nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny import tiny_model
from upq.blockwise import METHODS, BlockStore, walk
from upq.core.precision import computes_in_bf16
from upq.core.progress import Silent
from upq.core.scheme import QuantScheme
from upq.model import walker
from upq.model.source import Source

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("hardware", [True, False])
def test_auto_asks_the_device_and_on_a_cpu_width_and_hardware(hardware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": hardware}, raising=False)
    assert computes_in_bf16("auto", CUDA, 64)
    assert not computes_in_bf16("auto", CPU, 512)
    assert computes_in_bf16("auto", CPU, 2048) == hardware


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_what_is_named_is_taken(device: torch.device) -> None:
    assert computes_in_bf16("bf16", device, 64)
    assert not computes_in_bf16("fp32", device, 4096)


def test_an_old_torch_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    assert not computes_in_bf16("auto", CPU, 4096)


def test_blocks_in_bf16_give_float32_near_the_exact(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    source, tokens_NT, found = Source(tmp_path), torch.arange(48).view(4, 12), {}
    for bf16 in (False, True):
        step = next(walker.walk(source, tokens_NT, bf16=bf16))
        step.advance(source.block(0))
        found[bf16] = step.states[0]
        assert found[bf16].dtype == torch.float32
    error = (found[True] - found[False]).norm() / found[False].norm()
    assert 0 < error < 0.01  # bfloat16 has 8 bits


@pytest.mark.parametrize("name", METHODS.names())
def test_solutions_in_bf16_are_near_those_in_float32(name: str, tmp_path: Path) -> None:
    """Weights learned are float32, and the block's error is that of float32 up to what the products round."""
    tiny_model("llama").save_pretrained(tmp_path / "m")
    tokens_NT, scheme, cls = torch.arange(96).view(8, 12) % 67, QuantScheme(bits=2), METHODS.get(name)
    config = cls.Config(**({"iterations": 8, "batch_size": 4} if "iterations" in cls.Config.model_fields else {}))
    errors = {}
    for precision in ("fp32", "bf16"):
        store = BlockStore(tmp_path / precision, scheme, latents=True)
        source, method = Source(tmp_path / "m"), cls(config)
        walk(source, tokens_NT, method, store, given=None, seed=0, progress=Silent(), precision=precision)
        solutions = store.solutions(0)
        assert all(solution.latent_OI.dtype == torch.float32 for solution in solutions.values())
        errors[precision] = next(iter(store.report(0).values())).get("block", 0.0)
    assert errors["bf16"] == pytest.approx(errors["fp32"], rel=0.05)
