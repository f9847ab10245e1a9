"""Humming: the schema of the engine's own package, and the bytes. Its kernels need a GPU: nothing here runs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file

import upq
from tiny import tiny_artifact
from upq.core.errors import UPQError
from upq.core.scheme import QuantScheme
from upq.exports import export

WIDE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}


@pytest.fixture
def schemas(monkeypatch: pytest.MonkeyPatch) -> Any:
    """humming's descriptions of checkpoints, which need neither of the modules that need CUDA."""
    for module in ("humming.ops", "humming.device"):
        monkeypatch.setitem(sys.modules, module, MagicMock())
    return pytest.importorskip("humming.schema", reason="humming-kernels is not installed: make test-engines")


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(bits=2),
        QuantScheme(bits=2, group_size=32),
        QuantScheme(bits=2, grid="sym"),
        QuantScheme(bits=2, grid="q2_0"),
        QuantScheme(bits=2, grid="affine", group_size=32),
        QuantScheme(bits=3),
        QuantScheme(bits=4),
    ],
    ids=str,
)
def test_tensors_are_those_of_hummings_own_schema(scheme: QuantScheme, schemas: Any, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", scheme=scheme, dtype=torch.float16, attention_bias=True, **WIDE)
    assert export(artifact, "humming", tmp_path / "out").exact
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16"
    schema = schemas.BaseWeightSchema.from_config(config["quantization_config"])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    packed = upq.load(artifact)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        path = f"model.layers.1.{name}"
        own = {key.removeprefix(f"{path}."): tensor for key, tensor in stored.items() if key.startswith(f"{path}.")}
        rows, columns = packed.get_submodule(path).shape
        schema.validate_tensors(own, rows, columns, torch.float16, has_bias="attn" in name)
        wanted = schema.get_tensors_attrs(rows, columns, torch.float16, has_bias="attn" in name)
        assert own.keys() == wanted.keys()


def test_golden_bytes(tmp_path: Path) -> None:
    """Sixteen codes a word, the first in the lowest bits; scales as stored; the zero point 1.5."""
    artifact = tiny_artifact(tmp_path / "artifact", **WIDE)
    report = export(artifact, "humming", tmp_path / "out")
    assert {c.carrier for c in report.carriers} == {"uint2", "float32"}
    assert "not run" in report.checked
    stored = load_file(tmp_path / "out" / "model.safetensors")
    path = "model.layers.0.self_attn.q_proj"
    q = upq.load(artifact).get_submodule(path).qtensor()
    words = [
        sum(code << (2 * i) for i, code in enumerate(row[16 * w : 16 * w + 16]))
        for row in q.codes_OI.tolist()
        for w in range(4)
    ]
    assert [word % 2**32 for word in stored[f"{path}.weight"].flatten().tolist()] == words
    assert torch.equal(stored[f"{path}.weight_scale"], q.scale_OG)
    assert (stored[f"{path}.zero_point"] == 1.5).all()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == {
        "quant_method": "humming", "b_dtype": "uint2", "group_size": 0, "has_zero_point": True,
        "is_fp_zero_point": True, "ignore": ["lm_head"],
    }  # fmt: skip


def test_linears_that_do_not_fit_are_dense_and_named(tmp_path: Path) -> None:
    """Names as in the checkpoint, and as vLLM calls what it has fused."""
    artifact = tiny_artifact(tmp_path / "artifact", hidden_size=48, head_dim=16, intermediate_size=96)
    export(artifact, "humming", tmp_path / "out")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    block = "model.layers.0"
    assert {f"{block}.self_attn.q_proj", f"{block}.self_attn.qkv_proj", f"{block}.mlp.gate_up_proj"} <= set(ignored)
    assert f"{block}.mlp.down_proj" not in ignored


def test_bfloat16_scales_are_refused_before_writing(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", **WIDE)
    with pytest.raises(UPQError, match=r"a scale or a zero point rounded to bfloat16.*--allow-inexact"):
        export(artifact, "humming", tmp_path / "out", options={"dtype": "bf16"})
    report = export(artifact, "humming", tmp_path / "out", options={"dtype": "bf16", "allow_inexact": True})
    assert 0 < next(c for c in report.carriers if c.carrier == "uint2").relative_error < 2**-8
