"""torchao: what plain transformers computes from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'upq[export]'")

import upq
from tiny import FAMILIES, tiny_artifact
from upq.core.scheme import QuantScheme
from upq.exports import _directory as directory
from upq.exports import export

pytestmark = pytest.mark.usefixtures("reference")

IDS = torch.arange(2, 22).view(2, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_packed_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", family, dtype=dtype)
    export(artifact, "torchao", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype
    weight = model.model.layers[1].mlp.up_proj.weight
    assert type(weight).__name__ == "IntxUnpackedToInt8Tensor"
    assert (weight.zero_point == -0.5).all()
    assert torch.equal(model(IDS).logits, upq.load(artifact)(IDS).logits)


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(bits=4),
        QuantScheme(bits=3, group_size=16),
        QuantScheme(bits=2, grid="sym"),
        QuantScheme(bits=2, grid="affine", group_size=16),
    ],
    ids=str,
)
def test_every_scheme_has_a_place(scheme: QuantScheme, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", "qwen3", scheme=scheme, intermediate_size=48, embeddings_bits=8)
    export(artifact, "torchao", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model(IDS).logits, upq.load(artifact)(IDS).logits)


def test_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard describes every tensor: transformers keeps what the last one says."""
    monkeypatch.setattr(directory, "_SHARD", 10_000)
    artifact = tiny_artifact(tmp_path / "artifact")
    export(artifact, "torchao", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model(IDS).logits, upq.load(artifact)(IDS).logits)


def test_rounded_activations_on_request(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact")
    export(artifact, "torchao", tmp_path / "out", options={"activations": "int8"})
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    apart = (model(IDS).logits - upq.load(artifact)(IDS).logits).abs().max()
    assert 0 < apart < 0.5
