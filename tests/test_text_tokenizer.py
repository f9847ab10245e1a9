"""A tokenizer is what its files say, and is handed on as these files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from tiny import byte_tokenizer, tiny_artifact, tiny_model
from upq.artifact.manifest import file_entry, read_manifest, verify
from upq.artifact.publish import publish
from upq.core.errors import UPQError
from upq.exports import export
from upq.model.loading import load_tokenizer
from upq.text.tokenizer import check_ids, check_tokens, tokenizer_files, write_tokenizer

TEXTS = ("In 2023 the fox", "123 4567", " two  spaces", "é can't 10km\n\nNew", "<|im_end|>x", "", "e\u0301")
THREES = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), behavior="isolated")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
RULES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "threes": (pre_tokenizers.Sequence([THREES, BYTES]), None, {}),
    "digits": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]), normalizers.NFC(), {}),
    "whole words": (BYTES, None, {"ignore_merges": True}),
    "spaces": (pre_tokenizers.Metaspace(prepend_scheme="never"), None, {"byte_fallback": True}),
}
# What config.json and tokenizer_config.json name: transformers has rules of its own for each of these.
CLASSES = (
    ("llama", "GPT2Tokenizer"), ("llama", "LlamaTokenizer"), ("llama", "PreTrainedTokenizerFast"),
    ("qwen2", "PreTrainedTokenizerFast"), ("qwen3", "Qwen2Tokenizer"), ("mistral", "LlamaTokenizerFast"),
)  # fmt: skip


def source(folder: Path, family: str = "llama", kind: str = "PreTrainedTokenizerFast", rules: str = "threes") -> Path:
    """A directory with config.json and a tokenizer that joins digits, cut by `rules`."""
    folder.mkdir(parents=True, exist_ok=True)
    before, normalizer, options = RULES[rules]
    vocab = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("2", "0"), ("20", "2"), ("202", "3"), ("1", "2"), ("o", "x"), ("Ġ", "t")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Tokenizer(models.BPE(vocab, merges, **options))
    backend.pre_tokenizer, backend.decoder = before, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": kind, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": backend.get_vocab_size()}))
    return folder


@pytest.mark.parametrize("rules", RULES)
def test_the_ids_are_those_of_tokenizer_json(rules: str, tmp_path: Path) -> None:
    for n, (family, kind) in enumerate(CLASSES):
        folder = source(tmp_path / str(n), family, kind, rules)
        tokenizer, stored = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
        for text in TEXTS:
            wanted = stored.encode(text, add_special_tokens=False).ids
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == wanted, (family, kind, text)
            assert tokenizer.decode(wanted, skip_special_tokens=False) == stored.decode(
                wanted, skip_special_tokens=False
            )
        # Ids and mask: a decoder takes nothing else.
        assert set(tokenizer("a")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_vocabulary_of_another_kind_than_the_class_has_is_used(family: str, tmp_path: Path) -> None:
    folder = source(tmp_path / "model", family, "LlamaTokenizer")
    pieces = [("<unk>", 0.0), ("\u2581", -2.0), ("ab", -3.0), ("a", -4.0), ("b", -4.5), ("c", -5.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer("abc cab", add_special_tokens=False)["input_ids"] == backend.encode("abc cab").ids
    assert len(tokenizer) == len(pieces)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_class_adds_no_tokens_of_its_own(family: str, tmp_path: Path) -> None:
    """Without a word on them in the files, Llama's class would add <unk>, <s> and </s> behind the embedding's rows."""
    folder = source(tmp_path / "model", family)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizer, stored = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len(tokenizer) == stored.get_vocab_size()
    assert tokenizer("<s> <unk>", add_special_tokens=False)["input_ids"] == stored.encode("<s> <unk>").ids
    assert tokenizer.eos_token == "<|im_end|>"
    check_ids(tokenizer, stored.get_vocab_size(), "model")


def test_the_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer.py").write_text("code")
    (tmp_path / "out").mkdir()
    write_tokenizer(load_tokenizer(folder), tmp_path / "out", model=folder)
    names = {file.relative_to(tmp_path / "out").as_posix() for file in tokenizer_files(tmp_path / "out")}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"}
    assert all((tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_what_only_transformers_5_reads_is_spelled_for_both(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    newer = {
        "tokenizer_class": "TokenizersBackend",
        "eos_token": "<|im_end|>",
        "extra_special_tokens": ["<|im_start|>"],
        "model_specific_special_tokens": {"image_token": "<|endoftext|>"},
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(newer))
    (tmp_path / "out").mkdir()
    write_tokenizer(load_tokenizer(folder), tmp_path / "out", model=folder)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "additional_special_tokens": ["<|im_start|>"],
        "extra_special_tokens": {"image_token": "<|endoftext|>"},  # transformers 4 calls `keys()` of it
        "chat_template": newer["chat_template"],
    }
    (tmp_path / "out" / "config.json").write_text((folder / "config.json").read_text())
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == {"default": "a", "tool_use": "b"}
    assert set(again.all_special_tokens) == {"<|im_end|>", "<|im_start|>", "<|endoftext|>"}
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "b"


def test_a_named_template_is_a_file_of_its_folder(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    settings = {"chat_template": [{"name": "default", "template": "a"}, {"name": "../../evil", "template": "b"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "out").mkdir()
    with pytest.raises(UPQError, match=r"chat_template: names '\.\./\.\./evil', which is no file name"):
        write_tokenizer(load_tokenizer(folder), tmp_path / "out", model=folder)


def test_templates_in_a_folder_are_part_of_an_artefact(tmp_path: Path) -> None:
    name, out = "additional_chat_templates/tool_use.jinja", tmp_path / "out"
    out.mkdir()
    for made in (tmp_path / "first", tmp_path / "second"):  # the second takes the place of the first
        manifest = read_manifest(tiny_artifact(made))
        (made / name).parent.mkdir()
        (made / name).write_text("{{ tools }}")
        publish(made, out, manifest.model_copy(update={"files": {**manifest.files, name: file_entry(made / name)}}))
        verify(out, read_manifest(out))
    export(out, "dense", tmp_path / "dense")
    assert (tmp_path / "dense" / name).read_text() == "{{ tools }}"
    (out / name).write_text("{{ other }}")
    with pytest.raises(UPQError, match=r"tool_use\.jinja: damaged"):
        verify(out, read_manifest(out))


def test_an_id_beyond_the_embedding_is_named(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(eos="</s>")
    check_ids(tokenizer, 257, "model")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<|tool|>"])
    with pytest.raises(UPQError, match=r"^model: the pad_token '\[PAD\]' has id 257, .* embedding has 257 rows; enl"):
        check_ids(tokenizer, 257, "model")
    check_tokens(tokenizer, [], 257, "a.jsonl:1")
    with pytest.raises(UPQError, match=r"^a\.jsonl:1: the token '<\|tool\|>' has id 258, "):
        check_tokens(tokenizer, tokenizer("x <|tool|>")["input_ids"], 258, "a.jsonl:1")


def _piece(word: str, score: float, kind: int) -> bytes:
    """A piece of a SentencePiece model as protobuf."""
    raw = word.encode()
    body = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(body)]) + body


def sentencepiece(folder: Path) -> Path:
    """A model's directory with tokenizer.model alone."""
    tiny_model("llama", vocab_size=270).config.save_pretrained(folder)
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    pieces += [("ab", -1.0, 1), ("\u2581", -2.0, 1), *((letter, -3.0, 1) for letter in "abcdefghi")]
    (folder / "tokenizer.model").write_bytes(b"".join(_piece(*p) for p in pieces) + b"\x12\x05\x18\x02\x98\x02\x01")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_sentencepiece_model_alone_is_read(tmp_path: Path) -> None:
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor()
    folder = sentencepiece(tmp_path / "model")
    processor.LoadFromFile(str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(folder)
    for text in ("abc", "a cab in bed", "é 12"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == processor.EncodeAsIds(text)
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, tmp_path / "out", model=folder)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert written.encode("abc", add_special_tokens=False).ids == processor.EncodeAsIds("abc")


def test_a_missing_sentencepiece_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upq.model.loading.find_spec", lambda name: None)
    with pytest.raises(UPQError, match=r"tokenizer\.model is a SentencePiece model; pip install sentencepiece"):
        load_tokenizer(sentencepiece(tmp_path / "model"))
