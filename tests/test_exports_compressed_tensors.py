"""compressed-tensors: what plain transformers computes from it, and the bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: pip install 'upq[export]'")

import upq
from schemes import fitting
from tiny import FAMILIES, artifact_of_model, tiny_artifact, tiny_model
from upq.core.act_scheme import ActScheme
from upq.core.errors import UPQError
from upq.core.scheme import QuantScheme
from upq.exports import export
from upq.nn.activations import ActQuantiser
from upq.nn.packed import PackedLinear

pytestmark = pytest.mark.usefixtures("reference")

IDS = torch.arange(2, 22).view(2, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_packed_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", family, dtype=dtype, tie_word_embeddings=False)
    export(artifact, "compressed-tensors", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    # bfloat16 does not hold the scales; float16 does, and the rest of the model unless a number is very small
    assert model.dtype in {torch.bfloat16: (torch.float16, torch.float32)}.get(dtype, (dtype,))
    packed = upq.load(artifact, dtype=model.dtype)
    assert torch.equal(model(IDS).logits, packed(IDS).logits)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_every_width_that_holds_the_levels_loads(bits: int, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", "qwen3")
    report = export(artifact, "compressed-tensors", tmp_path / "out", options={"bits": bits})
    assert {c.carrier for c in report.carriers} == {f"int{bits}", "float32"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(model(IDS).logits, upq.load(artifact)(IDS).logits)


def test_two_bits_do_not_hold_seq_but_hold_sym(tmp_path: Path) -> None:
    seq = tiny_artifact(tmp_path / "seq")
    with pytest.raises(UPQError, match=r"cannot hold model\.layers\.0.*q_proj\.weight in 2 bits: its levels take 3"):
        export(seq, "compressed-tensors", tmp_path / "out", options={"bits": 2})
    assert not (tmp_path / "out").exists()
    sym = tiny_artifact(tmp_path / "sym", scheme=QuantScheme(bits=2, grid="sym"))
    report = export(sym, "compressed-tensors", tmp_path / "out")
    assert {c.carrier for c in report.carriers} == {"int2", "float32"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(model(IDS).logits, upq.load(sym)(IDS).logits)


def test_groups_and_mixed_widths(tmp_path: Path) -> None:
    artifact = tiny_artifact(
        tmp_path / "artifact", scheme=QuantScheme(bits=2, group_size=16), intermediate_size=48, embeddings_bits=8
    )
    export(artifact, "compressed-tensors", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(model(IDS).logits, upq.load(artifact)(IDS).logits)


@pytest.mark.parametrize("grid", ["nvfp4", "mxfp4"])
def test_fp4_keeps_its_bytes(grid: str, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", scheme=fitting(grid), intermediate_size=96, dtype=torch.bfloat16)
    report = export(artifact, "compressed-tensors", tmp_path / "out")
    assert report.exact
    assert {carried.carrier for carried in report.carriers} == {grid, "bfloat16"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == f"{grid}-pack-quantized"
    stored, ours = load_file(tmp_path / "out" / "model.safetensors"), load_file(artifact / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(stored[f"{name}_packed"], ours[f"{name}_packed"])
    assert torch.equal(stored[f"{name}_scale"].view(torch.uint8), ours[f"{name}_scale"])
    if grid == "nvfp4":
        assert stored[f"{name}_global_scale"].item() == 1 / ours[f"{name}_outer"].item()
        fused = [stored[f"model.layers.0.mlp.{part}_proj.weight_global_scale"] for part in ("gate", "up")]
        assert torch.equal(*fused)  # engines keep them in one matrix
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(model(IDS).logits, upq.load(artifact)(IDS).logits)


def test_golden_bytes(tmp_path: Path) -> None:
    """Codes 0..3 are the integers -3, -1, 1, 3, stored with 8 added, eight in a word, the first lowest."""
    artifact = tiny_artifact(tmp_path / "artifact")
    export(artifact, "compressed-tensors", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    q = upq.load(artifact).get_submodule(name).qtensor()
    words = [
        sum((2 * code + 5) << (4 * i) for i, code in enumerate(row[8 * w : 8 * w + 8]))
        for row in q.codes_OI.tolist()
        for w in range(4)
    ]
    found = stored[f"{name}.weight_packed"]
    assert found.shape == (32, 4)
    assert [word % 2**32 for word in found.flatten().tolist()] == words
    assert torch.equal(stored[f"{name}.weight_scale"], q.scale_OG.float() / 2)
    assert stored[f"{name}.weight_shape"].tolist() == [32, 32]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "strategy": "channel"}
    assert config["config_groups"] == {"group_0": {"targets": ["Linear"], "weights": weights}}


def test_bfloat16_scales_are_refused_before_writing(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", dtype=torch.bfloat16)
    with pytest.raises(UPQError, match=r"a scale has no exact place in bfloat16.*--allow-inexact"):
        export(artifact, "compressed-tensors", tmp_path / "out", options={"dtype": "bf16"})
    assert not (tmp_path / "out").exists()
    report = export(artifact, "compressed-tensors", tmp_path / "out", options={"dtype": "bf16", "allow_inexact": True})
    errors = {c.carrier: c.relative_error for c in report.carriers}
    assert 0 < errors["int4"] < 2**-8
    assert errors["bfloat16"] == 0


@pytest.mark.slow  # a Python without upq is a fresh one
def test_plain_transformers_generates_from_it(tmp_path: Path) -> None:
    export(tiny_artifact(tmp_path / "artifact"), "compressed-tensors", tmp_path / "out")
    code = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
ids = AutoTokenizer.from_pretrained({str(tmp_path / "out")!r})("hello", return_tensors="pt")
print(model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1])
assert not any(name.split(".")[0] == "upq" for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.strip() == "10"


def theirs(quantiser: ActQuantiser, x: Tensor) -> Tensor:
    """compressed-tensors' formula: as many steps as there are integers, from end to end of a token's range."""
    levels = 2.0 ** (quantiser.scheme.bits - 1)
    scale = x.abs().amax(-1, keepdim=True) / ((2 * levels - 1) / 2)
    return (x / scale).round().clamp(-levels, levels - 1) * scale


@pytest.mark.parametrize(
    ("scheme", "bits", "carrier"),
    [
        (QuantScheme(bits=2), 8, "int4"),
        (QuantScheme(bits=4, grid="sym", group_size=16), 8, "int4"),
        (QuantScheme(bits=8, grid="sym"), 8, "int8"),
        (QuantScheme(bits=4, grid="sym"), 4, "int4"),
    ],
    ids=["W2A8", "W4A8", "W8A8", "W4A4"],
)
def test_rounded_inputs_are_in_the_config_and_read(
    scheme: QuantScheme, bits: int, carrier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    activations, tiny = ActScheme(bits=bits), tiny_model("llama", vocab_size=300, intermediate_size=48)
    artifact = artifact_of_model(tmp_path / "artifact", tiny, None, scheme=scheme, activations=activations)
    report = export(artifact, "compressed-tensors", tmp_path / "out")
    assert {c.carrier for c in report.carriers} == {carrier, "float32"}
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    assert config["config_groups"]["group_0"]["input_activations"]["num_bits"] == bits
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    packed = upq.load(artifact)
    ours = packed(IDS).logits
    monkeypatch.setattr(ActQuantiser, "round", theirs)
    assert torch.allclose(model(IDS).logits, packed(IDS).logits, atol=1e-5)
    for layer in packed.modules():
        if isinstance(layer, PackedLinear):
            layer.input = None
    assert (packed(IDS).logits - ours).abs().max() > 1e-3 * ours.abs().max()


def test_what_is_rounded_and_not_carried_is_in_the_report(tmp_path: Path) -> None:
    rounded = {"activations": ActScheme(bits=4, symmetric=False), "kv": ActScheme(bits=4)}
    artifact = artifact_of_model(tmp_path / "artifact", tiny_model("llama", vocab_size=300), None, **rounded)
    report = export(artifact, "compressed-tensors", tmp_path / "out")
    assert report.notes[-1] == (
        "the weights alone are here, not the inputs of linears, which the artefact rounds to int4 per token, with a"
        " zero point and the keys and values, which the artefact rounds to int4 per token: the engine has its own"
    )
