"""OpenVINO: what its CPU plug-in computes, with state; the packed constants stay packed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

openvino: Any = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'upq[export]'")

import upq  # noqa: E402
from tiny import FAMILIES, tiny_artifact  # noqa: E402
from upq.core.scheme import QuantScheme  # noqa: E402
from upq.exports import export  # noqa: E402

pytestmark = pytest.mark.usefixtures("reference")

# The engine takes seconds to compile a model: CI runs the other pairs.
FAST = {("llama", True), ("smollm3", False)}
IDS = torch.randint(2, 250, (2, 20), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 0.0, "atol": 2e-4}
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_NUM_THREADS": "1"}


class Session:
    """The model in OpenVINO; its state lasts from call to call."""

    def __init__(self, folder: Path) -> None:
        self.model = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", EXACT)
        self.request = self.model.create_infer_request()
        self.seen = 0

    def __call__(self, ids_NT: Tensor) -> Tensor:
        n, t = ids_NT.shape
        positions = torch.arange(self.seen, self.seen + t).repeat(n, 1)
        self.seen += t
        feed = {
            "input_ids": ids_NT.numpy(),
            "attention_mask": np.ones((n, self.seen), np.int64),
            "position_ids": positions.numpy(),
            "beam_idx": np.arange(n, dtype=np.int32),
        }
        return torch.from_numpy(self.request.infer(feed)[0].copy())


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        pytest.param(family, tied, marks=() if (family, tied) in FAST else pytest.mark.slow)
        for family, tied in itertools.product(FAMILIES, (True, False))
    ],
)
def test_logits_are_those_of_the_packed_model(family: str, tied: bool, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", family, tie_word_embeddings=tied, num_hidden_layers=4)
    export(artifact, "openvino", tmp_path / "out")
    packed = upq.load(artifact)(IDS).logits
    torch.testing.assert_close(Session(tmp_path / "out")(IDS), packed, **CLOSE)
    step = Session(tmp_path / "out")
    parts = [step(IDS[:, :7]), *(step(IDS[:, i : i + 1]) for i in range(7, 20))]
    torch.testing.assert_close(torch.cat(parts, dim=1), packed, **CLOSE)


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(bits=2, group_size=16),
        QuantScheme(bits=2, grid="sym"),
        QuantScheme(bits=2, grid="affine", group_size=32),
        QuantScheme(bits=3),
        QuantScheme(bits=4, group_size=8),
        QuantScheme(bits=8),
    ],
    ids=str,
)
def test_schemes(scheme: QuantScheme, tmp_path: Path) -> None:
    shape = {"hidden_size": 96, "head_dim": 24, "intermediate_size": 288}
    artifact = tiny_artifact(tmp_path / "artifact", scheme=scheme, dtype=torch.bfloat16, embeddings_bits=8, **shape)
    assert export(artifact, "openvino", tmp_path / "out").exact
    packed = upq.load(artifact, dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(Session(tmp_path / "out")(IDS), packed, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_keep_their_type(dtype: torch.dtype, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", dtype=dtype, tie_word_embeddings=True)
    export(artifact, "openvino", tmp_path / "out")
    packed = upq.load(artifact, dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(Session(tmp_path / "out")(IDS), packed, **CLOSE)


def test_the_plug_in_keeps_the_constants_packed(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", hidden_size=256, head_dim=64, num_hidden_layers=1)
    export(artifact, "openvino", tmp_path / "out")
    nodes = Session(tmp_path / "out").model.get_runtime_model().get_ordered_ops()
    packed = [node for node in nodes if any(given.get_element_type() == openvino.Type.u2 for given in node.inputs())]
    assert len(packed) == 7
    assert all("MatMul" in node.get_friendly_name() for node in packed)


def test_it_generates_in_openvino_genai(tmp_path: Path) -> None:
    genai: Any = pytest.importorskip("openvino_genai", reason="pip install openvino-genai openvino-tokenizers")
    artifact = tiny_artifact(tmp_path / "artifact")
    export(artifact, "openvino", tmp_path / "out")
    pipeline = genai.LLMPipeline(str(tmp_path / "out"), "CPU", **EXACT)
    settings = genai.GenerationConfig()
    settings.max_new_tokens, settings.do_sample, settings.ignore_eos = 12, False, True
    mask = np.ones((1, 10), np.int64)
    given = genai.TokenizedInputs(openvino.Tensor(IDS[:1, :10].numpy()), openvino.Tensor(mask))
    found = pipeline.generate(given, settings).tokens[0]
    generate: Any = upq.load(artifact).generate
    wanted = generate(
        IDS[:1, :10], attention_mask=torch.from_numpy(mask), max_new_tokens=12, min_new_tokens=12, do_sample=False
    )
    assert list(found) == wanted[0, 10:].tolist()


def test_splitquant_is_three_linears_with_one_scale_each(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", scheme=QuantScheme(bits=6, grid="splitquant"), num_hidden_layers=1)
    assert export(artifact, "openvino", tmp_path / "out", options={"split": 3}).exact
    torch.testing.assert_close(Session(tmp_path / "out")(IDS), upq.load(artifact)(IDS).logits, **CLOSE)
