"""Student and teacher that are cut over the processes as they are read: what they are, and what a process holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from test_distill import Losses, Random, make_config, train
from tiny import tiny_model
from upq.core.scheme import QuantScheme
from upq.distill.sharding import load_sharded
from upq.distill.student import make_student
from upq.grids import search_scale
from upq.model.loading import load_model
from upq.model.source import Source
from upq.nn.fake_quant import Solution
from upq.nn.fixed_codes import Coded, Start
from upq.nn.trained import full_tensor

BLOCKS = 3
# Model to family, whether the head is the embedding, and whether norms and weights are trained.
MODELS: dict[str, tuple[str, bool, bool, bool]] = {
    "tied": ("llama", True, True, True),
    "biases": ("qwen2", False, False, True),
    "codes": ("qwen2", False, True, False),
}


class OneAtATime(Source):
    """The memory of a block's whole matrices is free before the next block is read."""

    def __init__(self, path: Path, *, latents: bool) -> None:
        super().__init__(path)
        self._latents = latents
        self.whole: list[StorageWeakRef] = []

    def hold(self, *tensors: Tensor) -> None:
        self.whole += [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors if tensor.dim() == 2]

    def block(self, index: int) -> nn.Module:
        assert all(ref.expired() for ref in self.whole)
        block = super().block(index)
        self.hold(*block.parameters())
        return block

    def solutions(self, index: int) -> dict[str, Start]:
        """Of nearest rounding, as a store has them."""
        scheme, block, found = QuantScheme(bits=2), super().block(index), dict[str, Start]()
        for name in (matrix.name for matrix in self.matrices(index)):
            w_OI = block.get_submodule(name).weight.clone()
            solution = Solution(w_OI, search_scale(w_OI, scheme), scheme)
            found[name] = solution if self._latents else Coded.of(solution.qtensor(), solution.params)
            self.hold(w_OI)
        return found


def prepare(folder: Path) -> None:
    for name, (family, tied, _, _) in MODELS.items():
        tiny_model(family, num_hidden_layers=BLOCKS, tie_word_embeddings=tied).save_pretrained(folder / name)


def ranked(folder: Path) -> None:
    said = {name: trained_both_ways(folder / name, norms, latents) for name, (_, _, norms, latents) in MODELS.items()}
    if torch.distributed.get_rank() == 0:
        (folder / "said.json").write_text(json.dumps(said))


def trained_both_ways(folder: Path, train_norms: bool, latents: bool) -> dict[str, Any]:
    """Losses of trainings that begin whole and in shards, and what was different or whole where it should not be."""
    model = OneAtATime(folder, latents=latents)
    prefix = model.layout.blocks
    solutions = {f"{prefix}.{i}.{k}": s for i in range(BLOCKS) for k, s in model.solutions(i).items()}
    model.whole.clear()
    teacher = load_model(folder).requires_grad_(False)
    student = make_student(teacher, solutions, train_norms=train_norms)
    students, teachers = load_sharded(model, model.solutions, train_norms=train_norms)
    different = []
    for expected, found in ((student, students), (teacher, teachers)):
        names = {name for name, _ in expected.named_parameters(remove_duplicate=False)}
        assert names == {name for name, _ in found.named_parameters(remove_duplicate=False)}
        for name in sorted(names):
            a, b = expected.get_parameter(name), found.get_parameter(name)
            if not torch.equal(a, full_tensor(b)) or a.requires_grad != b.requires_grad:
                different.append(name)
    # Blocks that run again in the backward pass, in one of the models: cut before or after that is switched on.
    config, losses = make_config(hidden=0.25, micro_batch_size=2, gradient_checkpointing=not train_norms), []
    for i, (s, t) in enumerate(((student, teacher), (students, teachers))):
        seen = Losses()
        train(s, t, config, folder / f"{i}.safetensors", 4, data=Random(), progress=seen, sharded=True)
        losses.append(seen.values)
    blocks = [model.get_submodule(prefix) for model in (student, teacher, students, teachers)]
    kept = [n for each in blocks for n, p in each.named_parameters() if not isinstance(p, DTensor)]
    checkpoints = [(folder / f"{i}.safetensors").read_bytes() for i in range(2)]
    return {"losses": losses, "different": different, "whole": kept, "same": checkpoints[0] == checkpoints[1]}


@pytest.fixture(scope="module")
def said(two_processes: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((two_processes / "test_distill_sharding" / "said.json").read_text())
    return found


@pytest.mark.parametrize("name", MODELS)
class TestLoadedInShards:
    def test_it_is_what_was_loaded_whole(self, name: str, said: dict[str, Any]) -> None:
        """And one block after the other: no process has two of them whole (OneAtATime)."""
        assert said[name]["different"] == []

    def test_it_trains_to_the_same_bits(self, name: str, said: dict[str, Any]) -> None:
        one, other = said[name]["losses"]
        assert len(one) == 4
        assert one == other
        assert said[name]["same"]

    def test_blocks_are_shards_again_after_a_step(self, name: str, said: dict[str, Any]) -> None:
        """The teacher's too, which no backward pass comes to."""
        assert said[name]["whole"] == []
