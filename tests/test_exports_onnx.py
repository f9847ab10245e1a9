"""ONNX: what ONNX Runtime computes, with and without a cache, and the bytes MatMulNBits reads."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'upq[export]'")
onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'upq[export]'")

import upq  # noqa: E402
from tiny import FAMILIES, tiny_artifact  # noqa: E402
from upq.core.errors import UPQError  # noqa: E402
from upq.core.scheme import QuantScheme  # noqa: E402
from upq.exports import Source, export  # noqa: E402
from upq.exports import _split as split  # noqa: E402
from upq.kernels import unpack  # noqa: E402

pytestmark = pytest.mark.usefixtures("reference")

# The engine takes seconds to compile a model: CI runs the other pairs.
FAST = {("llama", True), ("smollm3", False)}
IDS = torch.randint(2, 250, (2, 20), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 0.0, "atol": 2e-4}


class Session:
    """The model in ONNX Runtime, called as transformers calls a model."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        # At its usual level ONNX Runtime makes MatMulNBits with 8-bit activations of what `split` writes.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {given.name: given for given in self.session.get_inputs()}
        self.past: dict[str, Any] = {}

    def __call__(self, ids_NT: Tensor, mask_NS: Tensor | None = None) -> Tensor:
        """Logits; keys and values are kept for the next call."""
        n, t = ids_NT.shape
        caches = [name for name in self.inputs if name.startswith("past")]
        if not self.past:
            _, heads, _, size = self.inputs[caches[0]].shape
            self.past = {name: np.zeros((n, heads, 0, size), np.float32) for name in caches}
        before = self.past[caches[0]].shape[2]
        mask_NS = torch.ones(n, before + t, dtype=torch.int64) if mask_NS is None else mask_NS
        positions_NT = (mask_NS.cumsum(1) - 1).clamp_min(0)[:, before:]
        feed = {"input_ids": ids_NT, "attention_mask": mask_NS, "position_ids": positions_NT}
        logits, *present = self.session.run(None, {k: v.numpy() for k, v in feed.items()} | self.past)
        self.past = dict(zip(caches, present, strict=True))
        return torch.from_numpy(logits)


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        pytest.param(family, tied, marks=() if (family, tied) in FAST else pytest.mark.slow)
        for family, tied in itertools.product(FAMILIES, (True, False))
    ],
)
def test_logits_are_those_of_the_packed_model(family: str, tied: bool, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", family, tie_word_embeddings=tied, num_hidden_layers=4)
    export(artifact, "onnx", tmp_path / "out")
    packed = upq.load(artifact)(IDS).logits
    torch.testing.assert_close(Session(tmp_path / "out")(IDS), packed, **CLOSE)
    step = Session(tmp_path / "out")
    parts = [step(IDS[:, :7]), *(step(IDS[:, i : i + 1]) for i in range(7, 20))]
    torch.testing.assert_close(torch.cat(parts, dim=1), packed, **CLOSE)


def test_padding_on_the_left_is_not_read(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", "qwen2")
    export(artifact, "onnx", tmp_path / "out")
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    packed = upq.load(artifact)(IDS, attention_mask=mask, position_ids=positions).logits
    found = Session(tmp_path / "out")(IDS, mask)
    torch.testing.assert_close(found[0], packed[0], **CLOSE)
    torch.testing.assert_close(found[1, 6:], packed[1, 6:], **CLOSE)


@pytest.mark.parametrize(
    "config",
    [
        {"family": "mistral", "sliding_window": 5},
        {"family": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
                "attention_factor": 1.3,
            }
        },
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=str,
)  # fmt: skip
def test_windows_rotary_scaling_and_biases(config: dict[str, Any], tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", **config)
    export(artifact, "onnx", tmp_path / "out")
    torch.testing.assert_close(Session(tmp_path / "out")(IDS), upq.load(artifact)(IDS).logits, **CLOSE)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(bits=2),
        QuantScheme(bits=2, group_size=16),
        QuantScheme(bits=2, group_size=48),
        QuantScheme(bits=2, grid="sym"),
        QuantScheme(bits=2, grid="q2_0", group_size=32),
        QuantScheme(bits=2, grid="affine", group_size=32),
        QuantScheme(bits=3),
        QuantScheme(bits=4),
        QuantScheme(bits=8),
        QuantScheme(bits=2, group_size=8),
    ],
    ids=str,
)
def test_schemes_and_arithmetic(scheme: QuantScheme, activations: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 96, "head_dim": 24, "intermediate_size": 288}
    artifact = tiny_artifact(tmp_path / "artifact", scheme=scheme, dtype=torch.bfloat16, **shape)
    report = export(artifact, "onnx", tmp_path / "out", options={"activations": activations})
    assert report.exact
    assert ("MatMulNBits" in str(report.carriers)) == (scheme.group_size != 8)
    packed = upq.load(artifact, dtype=torch.float32)(IDS).logits
    found = Session(tmp_path / "out")(IDS)
    if activations == "float":
        torch.testing.assert_close(found, packed, **CLOSE)
    else:
        p, q = packed.log_softmax(-1), found.log_softmax(-1)
        assert (p.exp() * (p - q)).sum(-1).mean() < 1e-2  # of a random model, whose logits are large


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_embeddings(bits: int, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", embeddings_bits=bits, tie_word_embeddings=True)
    export(artifact, "onnx", tmp_path / "out")
    torch.testing.assert_close(Session(tmp_path / "out")(IDS), upq.load(artifact)(IDS).logits, **CLOSE)


def test_it_generates_in_onnxruntime_genai(tmp_path: Path) -> None:
    genai: Any = pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai")
    artifact = tiny_artifact(tmp_path / "artifact")
    export(artifact, "onnx", tmp_path / "out")
    model = genai.Model(str(tmp_path / "out"))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=24, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(IDS[:1, :10].to(torch.int32).numpy())
    while not generator.is_done():
        generator.generate_next_token()
    packed = upq.load(artifact)
    generate: Any = packed.generate
    wanted = generate(IDS[:1, :10], attention_mask=torch.ones(1, 10), max_new_tokens=14, do_sample=False)[0]
    assert list(generator.get_sequence(0))[: len(wanted)] == wanted.tolist()


def test_splitquant_is_three_linears_with_one_scale_each(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", scheme=QuantScheme(bits=6, grid="splitquant"), num_hidden_layers=1)
    report = export(artifact, "onnx", tmp_path / "out", options={"split": 3})
    assert report.exact
    assert "3 u4" in str(report.carriers)
    nodes = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False).graph.node
    assert {node.domain for node in nodes} == {""}  # standard operators alone
    assert sum(node.op_type == "DequantizeLinear" for node in nodes) == 3 * 7
    torch.testing.assert_close(Session(tmp_path / "out")(IDS), upq.load(artifact)(IDS).logits, **CLOSE)


def test_the_three_parts_are_disjoint_and_their_sum_is_the_weight(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", scheme=QuantScheme(bits=6, grid="splitquant"), num_hidden_layers=1)
    source = Source.open(artifact)
    for weight in (source.weights[name] for name in source.linears):
        dense = []
        for part in split.parts(weight):
            codes_OI = torch.cat([unpack(packed, 4, weight.shape[1]) for packed in part.packed()])
            dense.append((codes_OI.float() - part.zero) * part.scale)
        assert torch.equal(dense[0] + dense[1] + dense[2], weight.dequantize())
        assert sum((part != 0).int() for part in dense).max() == 1
        assert all((part != 0).any() for part in dense)


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_where_split_has_no_meaning_is_one_line(name: str, tmp_path: Path) -> None:
    seq = tiny_artifact(tmp_path / "seq", num_hidden_layers=1)
    with pytest.raises(UPQError, match=r"split=3 writes grid splitquant, and .* is on seq"):
        export(seq, name, tmp_path / "out", options={"split": 3})
    with pytest.raises(UPQError, match="split: input should be greater than or equal to 3"):
        export(seq, name, tmp_path / "out", options={"split": 2})
    splitquant = tiny_artifact(tmp_path / "a", scheme=QuantScheme(bits=6, grid="splitquant"), num_hidden_layers=1)
    with pytest.raises(UPQError, match="cannot hold grid splitquant"):
        export(splitquant, name, tmp_path / "out")
    if name == "onnx":
        with pytest.raises(UPQError, match="split=3 has no MatMulNBits"):
            export(splitquant, name, tmp_path / "out", options={"split": 3, "activations": "int8"})
    assert not (tmp_path / "out").exists()
