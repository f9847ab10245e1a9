"""LiteRT: what its own interpreter computes and generates from a program, and what the program has stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed: pip install 'upq[phones]'")

import upq
from tiny import FAMILIES, artifact_of, tiny_artifact, tiny_model
from upq.core.errors import UPQError
from upq.core.scheme import QuantScheme
from upq.exports import export
from upq.exports.litert import _MODEL, _program, _stored
from upq.world.reference import REFERENCE

pytestmark = pytest.mark.usefixtures("reference")

IDS = torch.randint(2, 250, (1, 24), generator=torch.Generator().manual_seed(0))
SMALL = {"context": 32, "chunk": 8, "bundle": False}
FLOAT = {"activations": "float", **SMALL}


class Program:
    """An exported program in LiteRT's interpreter, with the caches that a caller keeps."""

    def __init__(self, out: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.interpreter = Interpreter(str(out / _MODEL), num_threads=1)
        self.parts = {name: self.interpreter.get_signature_runner(name) for name in ("decode", "prefill_8")}
        inputs = self.parts["decode"].get_input_details()
        self.caches = {
            name: torch.zeros(tuple(each["shape"])).numpy()
            for name, each in inputs.items()
            if name.startswith("kv_cache")
        }

    def logits(self, first: int, ids_1T: Tensor) -> Tensor:
        """(1, V) of the last of 1 or 8 ids, whose first is number `first` of the text."""
        run = self.parts["decode" if ids_1T.shape[1] == 1 else "prefill_8"]
        places = torch.arange(first, first + ids_1T.shape[1]).int().numpy()
        made = run(tokens=ids_1T.int().numpy(), input_pos=places, **self.caches)
        self.caches = {name: made[name] for name in self.caches}
        return torch.from_numpy(made["logits"].copy())[0]

    def text(self) -> Tensor:
        """(T, V) from the last token of the first eight on, token by token."""
        parts = [self.logits(0, IDS[:, :8]), *(self.logits(i, IDS[:, i : i + 1]) for i in range(8, 24))]
        return torch.cat(parts)


def same_logits(artifact: Path, out: Path) -> None:
    assert export(artifact, "litert", out, options=FLOAT).exact
    packed = upq.load(artifact, dtype=torch.float32)(IDS).logits[0, 7:]
    torch.testing.assert_close(Program(out).text(), packed, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_packed_model(family: str, tmp_path: Path) -> None:
    """Eight tokens at once, then token by token."""
    layers = 4 if family == "smollm3" else 2
    same_logits(tiny_artifact(tmp_path / "artifact", family, num_hidden_layers=layers), tmp_path / "out")


def test_a_window_is_applied(tmp_path: Path) -> None:
    same_logits(tiny_artifact(tmp_path / "artifact", "mistral", sliding_window=5), tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("embeddings_bits", [None, 4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_exact(dtype: torch.dtype, embeddings_bits: int | None, tied: bool, tmp_path: Path) -> None:
    options = {"dtype": dtype, "embeddings_bits": embeddings_bits, "tie_word_embeddings": tied}
    same_logits(tiny_artifact(tmp_path / "artifact", **options), tmp_path / "out")


@pytest.mark.parametrize("bits", [3, 4])
def test_other_widths(bits: int, tmp_path: Path) -> None:
    same_logits(tiny_artifact(tmp_path / "artifact", scheme=QuantScheme(bits=bits)), tmp_path / "out")


@pytest.mark.parametrize("family", ["qwen3", "smollm3"])
def test_it_generates_the_packed_models_tokens(family: str, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", family)
    export(artifact, "litert", tmp_path / "out", options=FLOAT)
    model: Any = upq.load(artifact)
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    mask = torch.ones(1, 8, dtype=torch.int64)
    wanted = model.generate(IDS[:, :8], attention_mask=mask, **settings)[0, 8:].tolist()
    program = Program(tmp_path / "out")
    found = [best(program.logits(0, IDS[:, :8]))]
    while len(found) < 20:
        found.append(best(program.logits(7 + len(found), torch.tensor([found[-1:]]))))
    assert found == wanted


def best(logits_1V: Tensor) -> int:
    """The token that `generate` takes of these where it may not end."""
    return int(logits_1V[0].index_fill(0, torch.tensor([257]), -torch.inf).argmax())


def test_litert_lm_answers_as_the_packed_model(tmp_path: Path) -> None:
    """The same prompt, cut into the same tokens, and the same answer."""
    reason = "litert-lm-api is not installed: pip install 'upq[engines]'"
    litert_lm = pytest.importorskip("litert_lm", reason=reason)
    artifact = artifact_of(tmp_path / "artifact", REFERENCE)
    options = {"activations": "float", "context": 128, "chunk": 32}
    assert export(artifact, "litert", tmp_path / "out", options=options).exact
    tokenizer: Any = upq.exports.Source.open(artifact).tokenizer()
    model: Any = upq.load(artifact, dtype=torch.float32)
    greedy = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=0)
    with litert_lm.Engine(str(tmp_path / "out" / "model.litertlm"), backend=litert_lm.Backend.CPU()) as engine:
        for question in ("What is the capital of the north?", "Say hello."):
            asked = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
            given = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
            made = model.generate(**given, max_new_tokens=20, do_sample=False)[0, given["input_ids"].shape[1] :]
            with engine.create_conversation(sampler_config=greedy) as conversation:
                assert conversation.render_message_to_string(question) == prompt
                assert engine.tokenize(prompt) == given["input_ids"][0].tolist()
                answer = conversation.send_message(question, max_output_tokens=20).contents
            assert "".join(part.text for part in answer) == tokenizer.decode(made, skip_special_tokens=True)


def test_a_bundle_needs_a_tokenizer_that_litert_lm_reads(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    artifact = artifact_of(tmp_path / "artifact", tmp_path / "model")
    with pytest.raises(UPQError, match=r"has no tokenizer\.json, which LiteRT-LM reads; --set bundle=false"):
        export(artifact, "litert", tmp_path / "out")
    assert export(artifact, "litert", tmp_path / "out", options=SMALL).exact


def test_rounded_inputs_cost_little(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact")
    export(artifact, "litert", tmp_path / "out", options=SMALL)
    p_TV = upq.load(artifact)(IDS).logits[0, 7:].double().log_softmax(-1)
    q_TV = Program(tmp_path / "out").text().double().log_softmax(-1)
    assert 0 < (p_TV.exp() * (p_TV - q_TV)).sum(-1).mean() < 2e-3


@pytest.mark.parametrize("options", [SMALL, FLOAT])
def test_what_is_packed_stays_packed_and_is_stored_once(options: dict[str, Any], tmp_path: Path) -> None:
    """Two integers a byte in every linear, for both signatures together."""
    from ai_edge_litert import schema_py_generated as schema

    artifact = tiny_artifact(tmp_path / "artifact")
    report = export(artifact, "litert", tmp_path / "out", options=options)
    stored = _stored(_program(tmp_path / "out"))
    packed = [name for name, (tensor, _) in stored.items() if tensor.Type() == schema.TensorType.INT4]
    assert len(packed) == 14
    weights = upq.exports.Source.open(artifact).weights
    assert all(2 * len(stored[name][1]) == weights[name].numel for name in packed)
    # what is written beside the weights is less than they are
    assert (tmp_path / "out" / _MODEL).stat().st_size < 2 * sum(carried.bytes for carried in report.carriers)


def test_groups_are_refused(tmp_path: Path) -> None:
    scheme = QuantScheme(bits=2, group_size=16)
    artifact = tiny_artifact(tmp_path / "artifact", scheme=scheme, intermediate_size=64)
    with pytest.raises(UPQError, match=r"litert cannot hold scales of groups here \(model\.layers\.0\.\S+\)"):
        export(artifact, "litert", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context is 0; it is at least 1"),
        ({"chunk": 0}, "chunk is 0; it is at least 1"),
        ({"context": 8, "chunk": 9}, "chunk is 9, and the cache holds 8 tokens"),
    ],
)
def test_a_program_for_no_tokens_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UPQError, match=f"export litert: {message}"):
        export(tiny_artifact(tmp_path / "artifact"), "litert", tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upq.exports.litert._LARGEST", 10_000)
    with pytest.raises(UPQError, match=r"GB, and a file of LiteRT holds"):
        export(tiny_artifact(tmp_path / "artifact"), "litert", tmp_path / "out")
