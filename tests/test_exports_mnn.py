"""MNN: what its own language model runtime computes, generates and makes of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import upq
from tiny import FAMILIES, artifact_of, byte_tokenizer, tiny_artifact, tiny_model
from upq.core.errors import UPQError
from upq.core.scheme import QuantScheme
from upq.exports import export
from upq.exports._mtok import chat_template, mtok

IDS = torch.randint(2, 250, (1, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def llm() -> Any:
    """The module of MNN that loads language models."""
    return pytest.importorskip("MNN.llm", reason="MNN is not installed: pip install 'upq[phones]'")


def loaded(llm: Any, out: Path, **settings: Any) -> Any:
    """The exported model in the runtime."""
    model = llm.create(str(out / "config.json"))
    model.set_config({"thread_num": 1, **settings})
    model.load()
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    found = model.forward(ids.tolist())
    numbers = torch.from_numpy(found.read().copy()).view(tuple(found.shape)[1:])
    del found  # before the model, which owns its memory
    return numbers


@pytest.mark.usefixtures("reference")
class TestRuntime:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_logits_are_those_of_the_packed_model(self, llm: Any, family: str, tmp_path: Path) -> None:
        artifact = tiny_artifact(tmp_path / "artifact", family, num_hidden_layers=4)
        assert export(artifact, "mnn", tmp_path / "out", options={"activations": "float"}).exact
        packed = upq.load(artifact)(IDS).logits[0]
        whole = logits(loaded(llm, tmp_path / "out", all_logits=True), IDS[0])
        torch.testing.assert_close(whole, packed, rtol=0.0, atol=2e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("embeddings_bits", [None, 8])
    @pytest.mark.parametrize("tied", [True, False])
    def test_embeddings_are_exact(
        self, llm: Any, dtype: torch.dtype, embeddings_bits: int | None, tied: bool, tmp_path: Path
    ) -> None:
        options = {"dtype": dtype, "embeddings_bits": embeddings_bits, "tie_word_embeddings": tied}
        artifact = tiny_artifact(tmp_path / "artifact", **options)
        assert export(artifact, "mnn", tmp_path / "out", options={"activations": "float"}).exact
        packed = upq.load(artifact, dtype=torch.float32)(IDS).logits[0]
        whole = logits(loaded(llm, tmp_path / "out", all_logits=True), IDS[0])
        torch.testing.assert_close(whole, packed, rtol=0.0, atol=2e-4)

    def test_a_window_is_applied(self, llm: Any, tmp_path: Path) -> None:
        artifact = tiny_artifact(tmp_path / "artifact", "mistral", sliding_window=5)
        export(artifact, "mnn", tmp_path / "out", options={"activations": "float"})
        packed = upq.load(artifact)(IDS).logits[0]
        whole = logits(loaded(llm, tmp_path / "out", all_logits=True), IDS[0])
        torch.testing.assert_close(whole, packed, rtol=0.0, atol=2e-4)

    @pytest.mark.parametrize("family", ["qwen3", "smollm3"])
    def test_it_generates_the_packed_models_tokens(self, llm: Any, family: str, tmp_path: Path) -> None:
        artifact = tiny_artifact(tmp_path / "artifact", family)
        export(artifact, "mnn", tmp_path / "out", options={"activations": "float"})
        model: Any = upq.load(artifact)
        mask = torch.ones(1, 10, dtype=torch.int64)
        settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
        wanted = model.generate(IDS[:, :10], attention_mask=mask, **settings)[0, 10:].tolist()
        # MNN's Python asks for no tokens at all; its library takes their number
        found = loaded(llm, tmp_path / "out")._c_obj.generate(IDS[0, :10].tolist(), 20)
        assert found == wanted

    @pytest.mark.parametrize("scheme", [QuantScheme(bits=2), QuantScheme(bits=2, group_size=32)], ids=str)
    def test_rounded_inputs_cost_little(self, llm: Any, scheme: QuantScheme, tmp_path: Path) -> None:
        shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
        artifact = tiny_artifact(tmp_path / "artifact", scheme=scheme, **shape)
        export(artifact, "mnn", tmp_path / "out")
        p_TV = upq.load(artifact)(IDS).logits[0].double().log_softmax(-1)
        q_TV = logits(loaded(llm, tmp_path / "out", all_logits=True), IDS[0]).double().log_softmax(-1)
        assert (p_TV.exp() * (p_TV - q_TV)).sum(-1).mean() < 2e-3


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("bits", [2, 4])
def test_rows_of_more_than_16_bits(llm: Any, bits: int, tmp_path: Path) -> None:
    """A blob of that many rows has its shape in 32 bits."""
    model = tiny_model("llama", vocab_size=66_000, num_hidden_layers=1, tie_word_embeddings=True, hidden_size=16)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer(bos="<s>", eos="</s>").save_pretrained(tmp_path / "model")
    artifact = artifact_of(tmp_path / "artifact", tmp_path / "model", embeddings_bits=bits)
    assert export(artifact, "mnn", tmp_path / "out", options={"activations": "float"}).exact
    packed = upq.load(artifact)(IDS).logits[0]
    whole = logits(loaded(llm, tmp_path / "out", all_logits=True), IDS[0])
    torch.testing.assert_close(whole, packed, rtol=0.0, atol=2e-4)


# --- text


def bpe(**parts: Any) -> PreTrainedTokenizerFast:
    """A few words and all letters, cut as `parts` say."""
    letters = sorted({*"abcdeflouhwrdHAéß 0123456789.,!", "\u2581", *pre_tokenizers.ByteLevel.alphabet()})
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("w", "o"), ("r", "l"), ("wo", "rl"), ("worl", "d")]
    vocabulary = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


SPLIT = pre_tokenizers.Split(pattern="Regex", behavior="isolated")
CUTS: dict[str, dict[str, Any]] = {
    "bytes": {
        "pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        "decoder": decoders.ByteLevel(),
    },
    "NFC": {
        "normalizer": normalizers.NFC(),
        "pre_tokenizer": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        "decoder": decoders.ByteLevel(),
    },
    "replaced": {
        "normalizer": normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
        "decoder": decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    },
}
TEXTS = ("hello world", "Hello, hello 1234!", "  héllo\n\nwörld ß", "<s>hello</s> world", "he llo  world.")


@pytest.mark.parametrize("kind", CUTS)
def test_text_is_cut_as_transformers_cuts_it(llm: Any, kind: str, tmp_path: Path) -> None:
    tokenizer = bpe(**CUTS[kind])
    tiny_model("llama", vocab_size=400).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(artifact_of(tmp_path / "artifact", tmp_path / "model"), "mnn", tmp_path / "out")
    model = loaded(llm, tmp_path / "out", use_template=False)
    for text in TEXTS:
        assert model.tokenizer_encode(text) == tokenizer(text).input_ids, text


def test_a_chat_is_the_templates_text(llm: Any, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact")
    export(artifact, "mnn", tmp_path / "out")
    model = loaded(llm, tmp_path / "out")
    tokenizer: Any = upq.exports.Source.open(artifact).tokenizer()
    messages = [{"role": "user", "content": "hello"}]
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert model.apply_chat_template("hello") == wanted


def test_the_mark_of_what_is_trained_on_goes() -> None:
    tokenizer = byte_tokenizer(eos="</s>", chat_template="a{%- generation -%} b {% endgeneration -%}c")
    assert chat_template(tokenizer) == "a{%- if true -%} b {% endif -%}c"


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ({"normalizer": normalizers.NFD()}, "normalizer 'NFD'"),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "pre-tokenizer 'Whitespace'"),
        ({"decoder": decoders.CTC()}, "decoder 'CTC'"),
    ],
)
def test_a_tokenizer_that_mnn_has_not_is_refused(parts: dict[str, Any], what: str) -> None:
    with pytest.raises(UPQError, match=f"mnn: its tokenizer has no {what}"):
        mtok(bpe(**parts), [])


@pytest.mark.parametrize(("activations", "memory"), [("int8", "low"), ("float", "high")])
def test_the_choice_of_arithmetic_is_written(activations: str, memory: str, tmp_path: Path) -> None:
    pytest.importorskip("MNN", reason="MNN is not installed: pip install 'upq[phones]'")
    artifact = tiny_artifact(tmp_path / "artifact")
    export(artifact, "mnn", tmp_path / "out", options={"activations": activations})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["memory"] == memory
