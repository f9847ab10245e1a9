"""From end to end on tiny models of every family: quantised, trained, packed, loaded as a user would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import upq
from tiny import CHAT, byte_tokenizer
from upq import kernels
from upq.core.progress import Silent
from upq.model.coverage import coverage
from upq.model.loading import auto_class, load_config
from zoo import MODELS, WRAPPERS, random_model

SETTINGS = {
    "data.seq_len": 32,
    "data.validation": 4,
    "data.generated": None,
    "int2.samples": 4,
    "distill.tokens": 20 * 2 * 32,
    "distill.batch_size": 2,
    "distill.micro_batch_size": 2,
}
METHODS = {
    "rtn": {"int2.method": {"name": "rtn"}},
    "block_ap": {"int2.method": {"name": "block_ap", "iterations": 3, "batch_size": 2}},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The cat sat on the mat and looked at the dog. " * 400)
    return str(path)


def saved(name: str, path: Path) -> Path:
    random_model(name).save_pretrained(path)
    byte_tokenizer(bos="<s>", eos="</s>", chat_template=CHAT).save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "llama4_text", "zamba2", "granitemoehybrid", "gpt2", "gemma4_text"])
def test_a_model_of_each_kind(name: str, text: str, tmp_path: Path) -> None:
    check(name, {**SETTINGS, **METHODS["block_ap"]}, text, tmp_path)


@pytest.mark.slow
def test_packed_embeddings_leave_shared_blocks_tied(text: str, tmp_path: Path) -> None:
    check("zamba2", {**SETTINGS, **METHODS["rtn"], "embeddings.bits": 8, "distill.tokens": 128}, text, tmp_path)


@pytest.mark.zoo
@pytest.mark.parametrize("name", [*MODELS, *WRAPPERS])
def test_a_model_of_any_family(name: str, text: str, tmp_path: Path) -> None:
    check(name, {**SETTINGS, **METHODS["block_ap"]}, text, tmp_path)


@pytest.mark.zoo
@pytest.mark.parametrize("name", [*MODELS, *WRAPPERS])
def test_a_model_of_any_family_rounded_to_the_nearest(name: str, text: str, tmp_path: Path) -> None:
    check(name, {**SETTINGS, **METHODS["rtn"]}, text, tmp_path)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_5_text", "gemma3"])
def test_experts_hybrids_and_towers(name: str, text: str, tmp_path: Path) -> None:
    """One of each kind in every test run, with a shorter training."""
    check(name, {**SETTINGS, **METHODS["rtn"], "distill.tokens": 2 * 2 * 32}, text, tmp_path)


class Stops(Silent):
    """Stops the run as Ctrl-C does, once a stage has come so far."""

    def __init__(self, stage: str, units: int) -> None:
        self.stage, self.units, self.now = stage, units, ""

    def start(self, stage: str, *, done: int = 0) -> None:
        self.now = stage

    def advance(self, units: int = 1, **figures: float) -> None:
        if self.now == self.stage:
            self.units -= units
            if self.units <= 0:
                raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_moe", "gpt_oss", "lfm2", "qwen3_5_text"])
def test_stopped_and_resumed_is_never_stopped(name: str, text: str, tmp_path: Path) -> None:
    """In the middle of the blocks, then in the middle of the training: the same files."""
    settings = {**SETTINGS, **METHODS["block_ap"], "distill.tokens": 6 * 2 * 32, "distill.checkpoint_every": 2}
    source = saved(name, tmp_path / "source")
    whole = upq.quantize(source, tmp_path / "whole", data=text, progress=None, allow_partial=True, **settings)
    for stage, units in (("int2", 1), ("distill", 3)):
        with pytest.raises(KeyboardInterrupt):
            upq.quantize(
                source, tmp_path / "out", data=text, progress=Stops(stage, units), allow_partial=True, **settings
            )
    resumed = upq.quantize(source, tmp_path / "out", data=text, progress=None, allow_partial=True, **settings)
    assert resumed.files == whole.files


def check(name: str, settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    """The artefact loads by plain `from_pretrained`, in the source's own class, and computes what its codes say."""
    source, out = saved(name, tmp_path / "source"), tmp_path / "out"
    manifest = upq.quantize(source, out, data=text, progress=None, allow_partial=True, **settings)
    assert manifest.coverage == coverage(random_model(name)).text(2)
    model = auto_class(load_config(out)).from_pretrained(out)
    assert type(model) is type(random_model(name))
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), kernels.computing("reference"):
        packed, dense = model(input_ids=ids).logits, upq.load(out, dequantize=True)(input_ids=ids).logits
    assert torch.equal(packed, dense)
    with torch.no_grad():
        compiled = model(input_ids=ids).logits
    assert (compiled - packed).norm() < 0.3 * packed.norm()  # inputs in int8, of random models
    assert not torch.equal(compiled, packed)  # the kernels of the processor were at work
    assert model.generate(input_ids=ids[:1], max_new_tokens=3, do_sample=False).shape[1] > 9
