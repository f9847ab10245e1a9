"""MLX runs what UPQ exports, on its CPU back-end. `make test-engines` sets it up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed: make test-engines")
mlx_lm: Any = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: make test-engines")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import upq  # noqa: E402
from tiny import (  # noqa: E402
    FAMILIES,
    artifact_of,
    tiny_artifact,
)
from upq.core.errors import UPQError  # noqa: E402
from upq.core.scheme import QuantScheme  # noqa: E402
from upq.exports import export  # noqa: E402
from upq.world.reference import REFERENCE  # noqa: E402

pytestmark = pytest.mark.usefixtures("reference")

SHAPE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 288, "num_hidden_layers": 4}


def logits(path: Path, ids: list[int]) -> torch.Tensor:
    from mlx_lm.utils import load_model

    with mx.stream(mx.cpu):
        model, _ = load_model(path)
        out = model(mx.array([ids]))
        mx.eval(out)
    return torch.from_numpy(np.array(out.astype(mx.float32)))[0]


@pytest.fixture(autouse=True)
def on_the_cpu() -> None:
    mx.set_default_device(mx.cpu)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_packed_model(family: str, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", family, tie_word_embeddings=False, **SHAPE)
    assert export(artifact, "mlx", tmp_path / "out").exact
    ids = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    packed = upq.load(artifact)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(tmp_path / "out", ids), packed, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "scheme",
    [QuantScheme(bits=4), QuantScheme(bits=2, group_size=32), QuantScheme(bits=2, grid="affine", group_size=96)],
    ids=str,
)
def test_widths_and_groups(scheme: QuantScheme, tmp_path: Path) -> None:
    shape = {**SHAPE, "hidden_size": 192, "head_dim": 48, "intermediate_size": 288}
    artifact = tiny_artifact(tmp_path / "artifact", scheme=scheme, embeddings_bits=4, **shape)
    assert export(artifact, "mlx", tmp_path / "out").exact
    ids = list(range(30))
    packed = upq.load(artifact)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(tmp_path / "out", ids), packed, rtol=1e-3, atol=1e-3)


def test_half_precision_scales_are_refused_or_measured(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", **SHAPE)
    with pytest.raises(UPQError, match=r"scale or zero·scale rounded to float16.*--allow-inexact"):
        export(artifact, "mlx", tmp_path / "out", options={"scales": "fp16"})
    report = export(artifact, "mlx", tmp_path / "out", options={"scales": "fp16", "allow_inexact": True})
    errors = {c.carrier: c.relative_error for c in report.carriers}
    assert 0 < errors["affine 2"] < 2**-10


def test_the_reference_model_answers(tmp_path: Path) -> None:
    """mlx-lm's own generation, from the directory alone."""
    artifact = artifact_of(tmp_path / "artifact", REFERENCE)
    export(artifact, "mlx", tmp_path / "out")
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    messages = [{"role": "user", "content": "What is the capital of the north?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    said = mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=24)
    packed = upq.load(artifact, dtype=torch.float32)
    with torch.inference_mode():
        ids: Any = packed.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    wanted = tokenizer.decode(ids[0, len(prompt) :].tolist(), skip_special_tokens=True)
    assert said.split()[:3] == wanted.split()[:3]
