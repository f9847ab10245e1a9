"""Core ML: the saved program, read by coremltools and followed in float32, computes what the packed model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("coremltools", reason="coremltools is not installed: pip install 'upq[phones]'")

import upq
from mil import Program
from tiny import FAMILIES, tiny_artifact
from upq.core.errors import UPQError
from upq.core.scheme import QuantScheme
from upq.exports import export
from upq.exports.coreml import program

pytestmark = pytest.mark.usefixtures("reference")

CLOSE = 5e-4  # the factor of the scores is a number of float16
IDS = torch.randint(2, 250, (1, 12), generator=torch.Generator().manual_seed(0))


def logits(program: Program, first: int, ids: Tensor) -> Tensor:
    """Of ids whose first is number `first` of the text, with the mask that a caller makes."""
    last = first + ids.shape[1]
    mask = torch.full((1, 1, ids.shape[1], last), -30_000.0).triu(first + 1)
    return program(inputIds=ids, causalMask=mask)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "llama" else pytest.mark.slow) for name in FAMILIES]
)
def test_logits_are_those_of_the_packed_model(family: str, tmp_path: Path) -> None:
    """At once, and token by token with the program's own state."""
    layers = 4 if family == "smollm3" else 2
    artifact = tiny_artifact(tmp_path / "artifact", family, num_hidden_layers=layers)
    assert export(artifact, "coreml", tmp_path / "out", options={"context": 32}).exact
    packed = upq.load(artifact)(IDS).logits
    followed = Program(tmp_path / "out")
    parts = [logits(followed, 0, IDS[:, :7]), *(logits(followed, i, IDS[:, i : i + 1]) for i in range(7, 12))]
    torch.testing.assert_close(torch.cat(parts, dim=1), packed, rtol=0.0, atol=CLOSE)


def test_a_window_is_applied(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", "mistral", sliding_window=5)
    export(artifact, "coreml", tmp_path / "out", options={"context": 32})
    packed = upq.load(artifact)(IDS).logits
    followed = Program(tmp_path / "out")
    parts = [logits(followed, 0, IDS[:, :7]), *(logits(followed, i, IDS[:, i : i + 1]) for i in range(7, 12))]
    torch.testing.assert_close(torch.cat(parts, dim=1), packed, rtol=0.0, atol=CLOSE)


def test_what_is_packed_stays_packed(tmp_path: Path) -> None:
    """Codes in two bits, tables of whole numbers, scales in float16; and the model takes as many tokens as it says."""
    from coremltools.converters.mil.mil import types
    from coremltools.models.utils import load_spec

    artifact = tiny_artifact(tmp_path / "artifact", scheme=QuantScheme(bits=2, group_size=16), intermediate_size=64)
    export(artifact, "coreml", tmp_path / "out", options={"context": 40})
    operations: list[Any] = program(tmp_path / "out").functions["main"].operations
    tables = [operation for operation in operations if operation.op_type == "constexpr_lut_to_dense"]
    assert len(tables) == 14
    for table in tables:
        assert types.builtin_to_string(table.indices.dtype) == "uint2"
        assert table.lut.val.flatten().tolist() == [-3, -1, 1, 3]
    scales = [operation.scale for operation in operations if operation.op_type == "constexpr_blockwise_shift_scale"]
    assert {scale.val.dtype.name for scale in scales} == {"float16"}
    description = load_spec(str(tmp_path / "out" / "model.mlpackage")).description
    (tokens,) = (given for given in description.input if given.name == "inputIds")
    assert tokens.type.multiArrayType.shapeRange.sizeRanges[1].upperBound == 40
    assert {state.name for state in description.state} == {"keyCache", "valueCache"}


def test_a_context_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UPQError, match="export coreml: context is 0; it is at least 1"):
        export(tiny_artifact(tmp_path / "artifact"), "coreml", tmp_path / "out", options={"context": 0})
    assert not (tmp_path / "out").exists()
