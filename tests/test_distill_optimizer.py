"""AdamW with moments in 8 bits: near the one in float32, and resumed bit for bit from plain tensors."""

import sys

import pytest
import torch

from test_distill import make, make_config, train
from test_distill_teacher import StopsAfter, make_data, same
from tiny import tiny_model
from upq.core.errors import UPQError
from upq.distill.optimizer import check, make_optimizer, set_rate
from upq.files.tensors import load_tensors

pytest.importorskip("torchao")


def make_model():
    """Square matrices of 64: torchao leaves what is smaller than 4,096 values, such as scales, in float32."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 50, "head_dim": 16, "num_key_value_heads": 4}
    return tiny_model("llama", **shape).requires_grad_(False)


def test_resumed_training_is_bit_identical(tmp_path):
    teacher, data, config = make_model(), make_data(), make_config(optimizer="adamw8bit", weight_decay=0.1)
    whole, resumed = make(teacher), make(teacher)
    losses = train(whole, teacher, config, tmp_path / "whole.safetensors", data=data)
    with pytest.raises(KeyboardInterrupt):
        train(make(teacher), teacher, config, tmp_path / "c.safetensors", data=data, progress=StopsAfter(4))
    assert train(resumed, teacher, config, tmp_path / "c.safetensors", data=data) == losses[3:]
    assert same(whole, resumed)
    tensors, _ = load_tensors(tmp_path / "c.safetensors")
    moments = [t.nbytes for name, t in tensors.items() if name.endswith((".codes", ".scale"))]
    assert sum(moments) == 2 * 14 * 64 * 64 * (1 + 4 / 256)  # of 14 matrices: a byte, and a float32 for 256 of them


def test_a_step_is_near_that_of_float32_and_rates_are_each_groups_own():
    torch.manual_seed(0)
    start = [torch.randn(64, 64), torch.randn(64, 128)]
    moved = []
    for name in ("adamw", "adamw8bit"):
        weights = [torch.nn.Parameter(w.clone()) for w in start]
        groups = [{"params": [w], "lr": 1.0, "weight_decay": 0.0} for w in weights]
        optimizer = make_optimizer(make_config(optimizer=name), groups, torch.device("cpu"))
        generator = torch.Generator().manual_seed(1)
        for step in range(5):
            for group, rate in zip(optimizer.param_groups, (1e-2, 1e-4), strict=True):
                set_rate(group, rate * (step + 1))
            for w in weights:
                w.grad = torch.randn(w.shape, generator=generator)
            optimizer.step()
        moved.append([w.detach() - s for w, s in zip(weights, start, strict=True)])
    for exact, coarse in zip(*moved, strict=True):
        assert (exact - coarse).norm() < 0.1 * exact.norm()


def test_without_torchao_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UPQError, match=r"^distill\.optimizer=adamw8bit needs torchao; pip install 'upq\[train\]'$"):
        check(make_config(optimizer="adamw8bit"))
    check(make_config())
