"""ExecuTorch: what its own runtime computes and generates from a program, and what the program says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("executorch", reason="executorch is not installed: pip install 'upq[phones]'")

import upq
from tiny import tiny_artifact
from upq.core.errors import UPQError
from upq.core.scheme import QuantScheme
from upq.exports import export
from upq.exports._source import Source
from upq.exports.executorch import _PROGRAM, ExecuTorch, ExecuTorchOptions, _Stored

pytestmark = pytest.mark.usefixtures("reference")

IDS = torch.randint(2, 250, (1, 24), generator=torch.Generator().manual_seed(0))
FLOAT = {"activations": "float", "context": 32, "chunk": 16}


class Program:
    """An exported program in ExecuTorch's runtime."""

    def __init__(self, out: Path) -> None:
        from executorch.extension.llm.custom_ops import custom_ops
        from executorch.runtime import Runtime

        assert custom_ops is not None
        self.program = Runtime.get().load_program(out / _PROGRAM)
        self.forward = self.program.load_method("forward")

    def fact(self, name: str) -> Any:
        return self.program.load_method(name).execute([])

    def logits(self, first: int, ids_1T: Tensor) -> Tensor:
        """(1, V) of the last of some ids, whose first is number `first` of the text."""
        found: Tensor = self.forward.execute([ids_1T, torch.tensor([first])])[0]
        return found.clone()

    def text(self, prompt: int) -> Tensor:
        """(T, V) from the last token of a prompt on, token by token."""
        parts = [self.logits(0, IDS[:, :prompt]), *(self.logits(i, IDS[:, i : i + 1]) for i in range(prompt, 24))]
        return torch.cat(parts)

    def generate(self, ids: list[int], count: int) -> list[int]:
        """Greedily, and never the end."""
        found = [best(self.logits(0, torch.tensor([ids])))]
        while len(found) < count:
            found.append(best(self.logits(len(ids) + len(found) - 1, torch.tensor([found[-1:]]))))
        return found


def best(logits_1V: Tensor) -> int:
    """The token that `generate` takes of these where it may not end."""
    return int(logits_1V[0].index_fill(0, torch.tensor([257]), -torch.inf).argmax())


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3"])
def test_logits_are_those_of_the_packed_model(family: str, tmp_path: Path) -> None:
    """A prompt at once, then token by token with the program's own cache."""
    options = {"no_rope_layers": [0]} if family == "smollm3" else {}
    artifact = tiny_artifact(tmp_path / "artifact", family, num_hidden_layers=1, **options)
    assert export(artifact, "executorch", tmp_path / "out", options=FLOAT).exact
    packed = upq.load(artifact)(IDS).logits[0]
    torch.testing.assert_close(Program(tmp_path / "out").text(12), packed[11:], rtol=0.0, atol=2e-5)


def test_a_window_is_applied_and_what_is_packed_stays_packed(tmp_path: Path) -> None:
    """Two integers a byte in every linear of a block, though its inputs are float32."""
    artifact = tiny_artifact(tmp_path / "artifact", "mistral", sliding_window=5, num_hidden_layers=1)
    export(artifact, "executorch", tmp_path / "out", options=FLOAT)
    nodes = [node for node in _Stored(tmp_path / "out" / _PROGRAM)._nodes() if node.kind == "XNNFullyConnected"]
    filters = [node.values[node.ids["filter_id"]] for node in sorted(nodes, key=lambda node: node.number)]
    kinds = [each.get("tensor_value", each)["datatype"] for each in filters]
    assert kinds == 7 * ["xnn_datatype_qcint4"] + ["xnn_datatype_fp32"]
    packed = upq.load(artifact)(IDS).logits[0]
    torch.testing.assert_close(Program(tmp_path / "out").text(12), packed[11:], rtol=0.0, atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "tied", "embeddings_bits"),
    [(torch.bfloat16, True, 8), (torch.float16, False, 4), (torch.float16, True, None)],
)
def test_embeddings_are_exact(dtype: torch.dtype, tied: bool, embeddings_bits: int | None, tmp_path: Path) -> None:
    options = {"dtype": dtype, "embeddings_bits": embeddings_bits, "tie_word_embeddings": tied, "num_hidden_layers": 1}
    artifact = tiny_artifact(tmp_path / "artifact", **options)
    assert export(artifact, "executorch", tmp_path / "out", options=FLOAT).exact
    packed = upq.load(artifact, dtype=torch.float32)(IDS).logits[0]
    torch.testing.assert_close(Program(tmp_path / "out").text(12), packed[11:], rtol=0.0, atol=2e-5)


def test_it_generates_the_packed_models_tokens_and_says_what_it_is(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", "qwen3")
    export(artifact, "executorch", tmp_path / "out", options=FLOAT)
    model: Any = upq.load(artifact)
    mask = torch.ones(1, 10, dtype=torch.int64)
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    wanted = model.generate(IDS[:, :10], attention_mask=mask, **settings)[0, 10:].tolist()
    program = Program(tmp_path / "out")
    assert program.generate(IDS[0, :10].tolist(), 20) == wanted
    facts = {"get_max_seq_len": 16, "get_max_context_len": 32, "get_vocab_size": 300, "use_kv_cache": True}
    assert {name: program.fact(name)[0] for name in facts} == facts
    assert program.fact("get_bos_id") == [1]
    assert program.fact("get_eos_ids") == Source.open(artifact).ends()


@pytest.mark.parametrize(
    "scheme", [QuantScheme(bits=2), QuantScheme(bits=2, group_size=32, scale_dtype="bfloat16")], ids=str
)
def test_rounded_inputs_cost_little(scheme: QuantScheme, tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 1}
    artifact = tiny_artifact(tmp_path / "artifact", scheme=scheme, **shape)
    assert export(artifact, "executorch", tmp_path / "out", options={**FLOAT, "activations": "int8"}).exact
    p_TV = upq.load(artifact)(IDS).logits[0, 11:].double().log_softmax(-1)
    q_TV = Program(tmp_path / "out").text(12).double().log_softmax(-1)
    assert 0 < (p_TV.exp() * (p_TV - q_TV)).sum(-1).mean() < 2e-3


def plan(artifact: Path, **options: Any) -> Any:
    return ExecuTorch(ExecuTorchOptions(**options)).plan(Source.open(artifact))


def test_what_xnnpack_has_no_place_for_is_refused(tmp_path: Path) -> None:
    grouped = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    artifact = tiny_artifact(tmp_path / "a", scheme=QuantScheme(bits=2, group_size=32), **grouped)
    with pytest.raises(UPQError, match=r"executorch cannot hold 14 of .*XNNPACK's scales of groups are bfloat16"):
        export(artifact, "executorch", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UPQError, match=r"cannot hold groups with float activations: .*--set activations=int8"):
        plan(artifact, activations="float")
    artifact = tiny_artifact(tmp_path / "b", scheme=QuantScheme(bits=2, group_size=16), **grouped)
    with pytest.raises(UPQError, match="cannot hold groups of 16: XNNPACK has multiples of 32"):
        plan(artifact)


@pytest.mark.parametrize("key", ["context", "chunk"])
def test_a_program_for_no_tokens_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(UPQError, match=f"export executorch: {key} is 1; it is at least 2"):
        export(tiny_artifact(tmp_path / "artifact"), "executorch", tmp_path / "out", options={key: 1})
    assert not (tmp_path / "out").exists()
