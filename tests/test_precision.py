"""Which products are in bfloat16, and that nothing else is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import upq
from schemes import ROUNDING
from tiny import byte_tokenizer, tiny_model
from upq.blockwise import METHODS, BlockStore, walk
from upq.core import precision
from upq.core.precision import compute_dtype, computes_in_bf16, to_compute_dtype
from upq.core.progress import Silent
from upq.core.scheme import QuantScheme
from upq.model import walker
from upq.model.source import Source

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def faster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A CPU whose products are faster in this type."""
    found: torch.dtype = request.param
    monkeypatch.setattr(precision, "_seconds", lambda dtype: 1.0 if dtype == found else 2.0)
    monkeypatch.setattr(precision, "cpu_dtype", precision.cpu_dtype.__wrapped__)
    assert precision.cpu_dtype() == found
    return found


def test_auto_asks_the_device_and_on_a_cpu_width_and_speed(faster: torch.dtype) -> None:
    assert computes_in_bf16("auto", CUDA, 64)
    assert not computes_in_bf16("auto", CPU, 384)
    assert computes_in_bf16("auto", CPU, 2048) == (faster == torch.bfloat16)
    for began in (torch.float32, torch.bfloat16):  # what a run began with counts, on whatever CPU it goes on
        assert computes_in_bf16("auto", CPU, 2048, began) == (began == torch.bfloat16)


def test_a_model_is_computed_in_its_own_type_or_in_float32_where_that_is_faster(faster: torch.dtype) -> None:
    for own in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert compute_dtype(own, CUDA) == own
    assert compute_dtype(torch.float32, CPU) == torch.float32
    assert compute_dtype(torch.float64, CPU) == torch.float64
    assert compute_dtype(torch.bfloat16, CPU) == faster
    assert compute_dtype(torch.float16, CPU) == torch.float32
    assert compute_dtype(torch.bfloat16, CPU, torch.bfloat16) == torch.bfloat16


def test_a_loaded_model_stays_in_its_type_where_memory_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_dtype", lambda: torch.float32)
    model = tiny_model("llama").bfloat16()
    exact = {name: tensor.float() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    assert to_compute_dtype(model).dtype == torch.bfloat16
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**9))
    assert to_compute_dtype(model).dtype == torch.float32
    assert all(torch.equal(tensor, exact[name]) for name, tensor in model.state_dict().items())


def test_the_measured_type_is_the_faster_one() -> None:
    """On the machine that runs it; far enough apart that a busy one does not turn it round."""
    times = {dtype: precision._seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    fast, slow = sorted(times, key=lambda dtype: times[dtype])
    if times[slow] > 4 * times[fast]:
        assert precision.cpu_dtype() == fast


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_what_is_named_is_taken(device: torch.device) -> None:
    assert computes_in_bf16("bf16", device, 64)
    assert not computes_in_bf16("fp32", device, 4096)


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


@pytest.mark.parametrize("name", ROUNDING)
def test_solutions_in_bf16_are_near_those_in_float32(name: str, tmp_path: Path) -> None:
    """Weights learned are float32, and the block's error is that of float32 up to what the products round."""
    tiny_model("llama").save_pretrained(tmp_path / "m")
    tokens_NT, scheme, cls = torch.arange(96).view(8, 12) % 67, QuantScheme(bits=2), METHODS.get(name)
    config = cls.Config(**({"iterations": 8, "batch_size": 4} if "iterations" in cls.Config.model_fields else {}))
    errors = {}
    for asked in ("fp32", "bf16"):
        store = BlockStore(tmp_path / asked, scheme, latents=True)
        source, method = Source(tmp_path / "m"), cls(config)
        walk(source, tokens_NT, method, store, given=None, seed=0, progress=Silent(), precision=asked)
        solutions = store.solutions(0)
        assert all(solution.latent_OI.dtype == torch.float32 for solution in solutions.values())
        errors[asked] = next(iter(store.report(0).values())).get("block", 0.0)
    assert errors["bf16"] == pytest.approx(errors["fp32"], rel=0.05)


# --- a run


SETTINGS: dict[str, Any] = {
    "generate": None, "data.seq_len": 16, "data.validation": 4, "int2.samples": 4,
    "int2.method": {"name": "block_ap", "scale": "max", "iterations": 1, "batch_size": 2}, "distill.tokens": 64,
    "distill.batch_size": 2, "distill.micro_batch_size": 2,
}  # fmt: skip


class Notes(Silent):
    """Keeps the notes, and ends a run as the stage `stop` begins."""

    def __init__(self, stop: str = "") -> None:
        self.notes, self.stop = list[str](), stop

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, stage: str, *, done: int = 0) -> None:
        if stage == self.stop:
            raise KeyboardInterrupt


def saved(folder: Path, model: PreTrainedModel) -> tuple[Path, Path]:
    """The model with a tokenizer, and a text."""
    model.save_pretrained(folder)
    byte_tokenizer(bos="<s>", eos="</s>").save_pretrained(folder)
    text = folder.with_suffix(".txt")
    text.write_text("\n".join(f"Line {i}: the square of {i} is {i * i}." for i in range(300)))
    return folder, text


def test_a_run_ends_in_the_type_that_it_began_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between its stages, it goes on on a CPU that is faster in float32."""
    monkeypatch.setattr(precision, "_WIDE", 1)
    model, text = saved(tmp_path / "m", tiny_model("llama", vocab_size=300, eos_token_id=257).bfloat16())
    fast, whole, stopped = Notes(), tmp_path / "whole", tmp_path / "stopped"
    monkeypatch.setattr("upq.run.run.cpu_dtype", lambda: torch.bfloat16)
    manifest = upq.quantize(model, whole, data=text, progress=fast, **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        upq.quantize(model, stopped, data=text, progress=Notes("distill"), **SETTINGS)
    monkeypatch.setattr("upq.run.run.cpu_dtype", lambda: torch.float32)
    slow = Notes()
    again = upq.quantize(model, stopped, data=text, progress=slow, **SETTINGS)
    assert [note for note in slow.notes if "bfloat16" in note] == [
        f"{stopped}: goes on in bfloat16 on the CPU, as it began, not float32"
    ]
    assert not any("goes on" in note for note in fast.notes)
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert again.metrics == manifest.metrics
    assert {figures["dtype"] for figures in again.metrics.values()} == {"bfloat16"}


def test_a_model_that_overflows_in_float16_is_computed_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once on a CPU; on an accelerator, whose rule stands in here, once it has overflowed."""
    large = tiny_model("llama", vocab_size=300, eos_token_id=257)
    with torch.no_grad():
        for linear in large.model.layers[0].mlp.children():
            for weight in linear.parameters():
                weight *= 200
    assert large(torch.arange(32)[None]).logits.isfinite().all()
    assert large.half()(torch.arange(32)[None]).logits.isnan().any()
    model, text = saved(tmp_path / "m", large)
    rounding = {**SETTINGS, "int2.method": "rtn", "distill.tokens": 0}
    on_cpu = upq.quantize(model, tmp_path / "a", data=text, progress=None, **rounding).metrics
    found = upq.evaluate(model, text=text, seq_len=32, progress=None)
    assert found["dtype"] == on_cpu["source"]["dtype"] == on_cpu["artifact"]["dtype"] == "float32"
    assert on_cpu["artifact"]["kld"] > 0
    for module in ("upq.run.frame", "upq.core.precision"):
        monkeypatch.setattr(f"{module}.compute_dtype", lambda own, *_: own)
    heard = Notes()
    assert upq.quantize(model, tmp_path / "b", data=text, progress=heard, **rounding).metrics == on_cpu
    assert "check: the model overflows in float16; it is computed in float32" in heard.notes
    assert upq.evaluate(model, text=text, seq_len=32, progress=heard) == found
    assert "overflows in float16; computed in float32" in heard.notes
