"""Where tensors live: the stages run on a device that is not the CPU (tests/far.py), wherever there is no GPU too."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from far import FarError, far_away
from schemes import PLAIN, ROUNDING, SCALAR, fitting
from tiny import tiny_model
from upq.artifact.transformers import pack_model
from upq.blockwise import METHODS, BlockStore, walk
from upq.core.progress import Silent
from upq.core.scheme import QuantScheme
from upq.core.signals import Stopped
from upq.distill import trainer
from upq.distill.config import Distill
from upq.distill.student import make_student, trained_blocks
from upq.distill.teacher import CachedTeacher, StreamedTeacher, Teacher, write_cache
from upq.evals import evaluate_text, streamed
from upq.files.tensors import load_metadata
from upq.grids import GRIDS, search_scale
from upq.losses import LOSSES
from upq.model.activations import allocator
from upq.model.source import Source
from upq.nn.blocks import model_weights
from upq.nn.fake_quant import Solution
from upq.nn.fixed_codes import Coded
from upq.nn.packed import PackedLinear

IDS = torch.randint(2, 67, (6, 12), generator=torch.Generator().manual_seed(0))
# Narrow: every operation goes through Python, and GPTQ has some for each column.
SHAPE = {
    "attention_bias": True,
    "hidden_size": 8,
    "intermediate_size": 12,
    "head_dim": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MASK = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama", **SHAPE).save_pretrained(path)
    return path


def test_what_a_gpu_refuses_is_refused() -> None:
    near = torch.ones(3)
    with far_away() as device:
        far = torch.ones(3, device=device)
        assert (far + near.sum()).device == far.device
        assert far[torch.tensor([0, 2])].shape == (2,)
        assert far.cpu().device == near.device
        assert float(far.sum()) == 1
        for wrong in (lambda: far + near, lambda: near[far.long()], lambda: torch.cat([far, near])):
            with pytest.raises((FarError, NotImplementedError)):
                wrong()


@pytest.mark.parametrize("on_disk", [False, pytest.param(True, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", ROUNDING)
def test_the_walk(name: str, on_disk: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages, the second one twice: a block that was solved before is run."""
    adam = torch.optim.Adam  # fused, it knows no such device
    monkeypatch.setattr(torch.optim, "Adam", lambda groups, **settings: adam(groups, **{**settings, "fused": False}))
    cls = METHODS.get(name)
    few = {"iterations": 2, "relative": on_disk} if "iterations" in cls.Config.model_fields else {}
    store = BlockStore(tmp_path / "blocks", QuantScheme(bits=3), latents=on_disk)
    source = BlockStore(tmp_path / "source", QuantScheme(bits=4), latents=False)
    for given, into in ((None, source), (source, store), (source, store)):
        into.path(1).unlink(missing_ok=True)
        with far_away() as device:
            walk(
                Source(model, device=device), IDS, cls(cls.Config(scale="max", **few)), into, given=given,
                seed=0, progress=Silent(), activations=allocator(tmp_path if on_disk else None),
            )  # fmt: skip
        assert into.done(2) == 2


class Rows:
    def batch(self, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return IDS[:size], MASK[:size]

    def rows(self, step: int, size: int) -> torch.Tensor:
        return torch.arange(size)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What belongs to torch and accelerate and knows no such device."""
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(trainer, "make_optimizer", lambda config, groups, device: torch.optim.AdamW(groups))


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("kind", "loss"), [*(("resident", loss) for loss in LOSSES.names()), ("offloaded", "gjs"), ("cached", "gjs")]
)
def test_the_training(kind: str, loss: str, model: Path, tmp_path: Path) -> None:
    hidden = 0.0 if kind == "cached" else 0.5
    config = Distill(
        loss=loss, hidden=hidden, tokens=1, batch_size=6, micro_batch_size=4, lr=1e-2, scale_lr=1e-3, precision="fp32",
        train_norms=True, checkpoint_every=2, gradient_checkpointing=kind == "offloaded",
    )  # fmt: skip
    # A zero point of 1, which is what is read of a tensor that is far, is one of this grid's.
    scheme, original = (
        QuantScheme(bits=2, grid="affine"),
        tiny_model("llama", **SHAPE).requires_grad_(False),
    )
    weights = {path: original.get_submodule(path).weight for path in model_weights(original)}
    solutions = {path: Solution(w, search_scale(w, scheme), scheme) for path, w in weights.items()}
    with far_away() as device:
        teacher = original.to(device)
        student = make_student(teacher, solutions, train_norms=True)
        config = trainer.settled(config, teacher, Rows())
        streamed = StreamedTeacher.of(Source(model, device=device), teacher)
        taught: Teacher = teacher
        if kind == "offloaded":
            taught = streamed
        elif kind == "cached":
            taught = CachedTeacher(tmp_path / "cache", tuple(range(len(IDS))))
            write_cache(taught, streamed, IDS, config, progress=Silent())
        with pytest.raises(Stopped):  # whether to stop is read as well
            trainer.distill(
                student, taught, Rows(), config, total_steps=3, checkpoint=tmp_path / "state", progress=Silent()
            )
        assert load_metadata(tmp_path / "state")["step"] == 1
        store = BlockStore(tmp_path / "trained", scheme)
        for index, solutions in trained_blocks(student):
            store.save(index, solutions, {})
        assert store.done(2) == 2


@pytest.mark.parametrize("grid", [grid for grid in SCALAR if grid not in PLAIN])
def test_levels_of_one_kind(grid: str) -> None:
    """Searched, rounded, trained and multiplied with."""
    scheme, w_OI = fitting(grid), torch.randn(4, 64)
    with far_away() as device:
        w_OI = w_OI.to(device)
        params = search_scale(w_OI, scheme)
        q = GRIDS.get(grid).freeze(w_OI, params, scheme)
        coded, packed = Coded.of(q, params).layer(None, torch.device(device)), PackedLinear.from_qtensor(q)
        assert coded.fake().shape == packed.dequantize().shape
        assert packed(torch.randn(3, 64).to(device)).shape == (3, 4)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("embeddings", [None, 8])
@pytest.mark.parametrize("grid", PLAIN)
def test_the_check(grid: str, embeddings: Any, model: Path, tmp_path: Path) -> None:
    scheme = QuantScheme(bits=2, grid=grid)
    packed = Source(model, dtype="auto").without_matrices()
    weights = {path: torch.randn(packed.get_submodule(path).weight.shape) for path in model_weights(packed)}
    codes = {path: GRIDS.get(grid).freeze(w, search_scale(w, scheme), scheme) for path, w in weights.items()}
    pack_model(packed, codes, embeddings_bits=embeddings)
    with far_away() as device, allocator(tmp_path) as allocate:
        original = streamed(Source(model, device=device, dtype="auto"), IDS, allocate=allocate)
        found = evaluate_text(packed.to(device), IDS, teacher=original, mask_NT=MASK, chunk_tokens=7)
    assert found.tokens == int(MASK[:, 1:].sum())
