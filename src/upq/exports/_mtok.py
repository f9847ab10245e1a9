"""tokenizer.mtok: a tokenizer as MNN's language models read it.

The layout is that of MNN 3.6's `PipelineTokenizer::load_vocab_binary` (transformers/llm/engine/src/tokenizer): a head
of text, then little-endian binary parts in the order of tokenizer.json.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from struct import pack
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from upq.core.errors import UPQError

_MAGIC, _PIPELINE = 430, 4
_MERGED_WITH_PREVIOUS = 2
# {% generation %} marks what is trained on; only transformers knows it. A condition keeps the same white space.
_MARK = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


def mtok(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> bytes:
    """The file's content; `ends` are the ids on which an answer stops. UPQError for what MNN cannot cut as we do."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UPQError(f"mnn: {type(tokenizer).__name__} has no tokenizer.json, and MNN reads no other here")
    parts = json.loads(backend.to_str())
    added: list[dict[str, Any]] = parts.get("added_tokens") or []
    special = sorted({token["id"] for token in added if token["special"]} | set(tokenizer.all_special_ids))
    first = tokenizer("A").input_ids
    prefix = first[: len(first) - len(tokenizer("A", add_special_tokens=False).input_ids)]
    head = f"{_MAGIC} {_PIPELINE}\n{len(special)} {len(ends)} {len(prefix)}\n"
    head += " ".join(map(str, [*special, *ends, *prefix])) + "\n"
    return b"".join(
        [
            head.encode(),
            _normalizer(parts.get("normalizer")),
            _cutter(parts.get("pre_tokenizer")),
            _model(parts),
            _decoder(parts.get("decoder")),
            pack("<I", len(added)),
            *(_added(token) for token in added),
            _chat(tokenizer),
        ]
    )


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template without transformers' own tag; empty where there is none."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    return _MARK.sub(lambda tag: "{%" + tag[1] + (" endif " if tag[2] else " if true ") + tag[3] + "%}", found or "")


def _text(text: str) -> bytes:
    raw = text.encode()
    return pack("<H", len(raw)) + raw


def _refuse(part: str, kind: object) -> UPQError:
    return UPQError(f"mnn: its tokenizer has no {part} {kind!r}; a model that is fed other tokens talks nonsense")


def _pattern(part: dict[str, Any], what: str) -> str:
    pattern = part["pattern"]
    if "String" not in pattern:
        raise _refuse(what, "Regex")
    text: str = pattern["String"]
    return text


def _changed(form: Literal["NFC", "NFKC"]) -> bytes:
    """Every character that a normal form changes, as (code, UTF-8)."""
    characters = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    pairs = [(letter, normal) for letter in characters if (normal := unicodedata.normalize(form, letter)) != letter]
    return pack("<I", len(pairs)) + b"".join(pack("<I", ord(letter)) + _text(normal) for letter, normal in pairs)


def _normalizer(part: dict[str, Any] | None) -> bytes:
    if part is None:
        return b"\0"
    kind = part["type"]
    if kind in ("NFC", "NFKC"):
        return b"\6" + _changed(kind)
    if kind == "Prepend":
        return b"\2" + _text(part["prepend"])
    if kind == "Replace":
        return b"\3" + _text(_pattern(part, "normalizer Replace with")) + _text(part["content"])
    if kind == "Sequence":
        return b"\4" + _sequence(map(_normalizer, part["normalizers"]))
    if kind == "Lowercase":
        return b"\5\0\0\0\1"
    if kind == "Strip":
        return b"\x08" + pack("<BB", part["strip_left"], part["strip_right"])
    raise _refuse("normalizer", kind)


def _cutter(part: dict[str, Any] | None) -> bytes:
    if part is None:
        return b"\0"
    kind = part["type"]
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return b"\1" + pack("<B", part["use_regex"])
    if kind == "Digits":
        return b"\2" + pack("<B", part["individual_digits"])
    if kind == "Metaspace" and part.get("prepend_scheme") in ("always", "never"):
        return b"\3" + _text(part["replacement"]) + pack("<B", part["prepend_scheme"] == "always")
    if kind == "Split":
        behaviour = {"Isolated": 0, "Removed": 1, "MergedWithPrevious": _MERGED_WITH_PREVIOUS}.get(part["behavior"])
        if behaviour is None:
            raise _refuse("pre-tokenizer Split with", part["behavior"])
        pattern = part["pattern"].get("Regex") or re.escape(part["pattern"]["String"])
        return b"\4" + _text(pattern) + pack("<BB", part["invert"], behaviour)
    if kind == "Sequence":
        return b"\6" + _sequence(map(_cutter, part["pretokenizers"]))
    raise _refuse("pre-tokenizer", kind)


def _model(parts: dict[str, Any]) -> bytes:
    model = parts["model"]
    kind = model["type"]
    if kind == "Unigram":
        entries = sorted((token, i, score) for i, (token, score) in enumerate(model["vocab"]))
        body = b"".join(_text(token) + pack("<Id", i, score) for token, i, score in entries)
        return b"\2" + pack("<IIB", len(entries), model["unk_id"] or 0, model.get("byte_fallback", False)) + body
    if kind != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refuse("model", kind)
    vocabulary: dict[str, int] = model["vocab"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    ranked = sorted((vocabulary[a], vocabulary[b], rank) for rank, (a, b) in enumerate(merges))
    # Bytes stand for themselves where no cutter has turned them into letters, though the decoder expects letters.
    letters = _has(parts.get("decoder"), "ByteLevel", "decoders")
    turned = _has(parts.get("pre_tokenizer"), "ByteLevel", "pretokenizers")
    flags = pack("<BB", model.get("byte_fallback", False), letters and not turned)
    # MNN looks tokens up by halves, in the order of their bytes
    tokens = sorted((token.encode(), i) for token, i in vocabulary.items())
    body = b"".join(pack("<H", len(token)) + token + pack("<I", i) for token, i in tokens)
    return (
        b"\0"
        + pack("<I", len(tokens))
        + flags
        + pack("<I", len(ranked))
        + body
        + b"".join(pack("<III", *merge) for merge in ranked)
    )


def _decoder(part: dict[str, Any] | None) -> bytes:
    kind = part["type"] if part is not None else "ByteLevel"
    assert part is not None or kind == "ByteLevel"
    part = part or {}
    if kind == "ByteLevel":
        return b"\0"
    if kind == "ByteFallback":
        return b"\1"
    if kind == "Metaspace":
        return b"\2" + _text(part["replacement"]) + pack("<B", part.get("prepend_scheme") != "never")
    if kind == "Fuse":
        return b"\4"
    if kind == "Replace":
        return b"\5" + _text(_pattern(part, "decoder Replace with")) + _text(part["content"])
    if kind == "Strip":
        return b"\6" + _text(part["content"]) + pack("<II", part["start"], part["stop"])
    if kind == "Sequence":
        return b"\7" + _sequence(map(_decoder, part["decoders"]))
    raise _refuse("decoder", kind)


def _added(token: dict[str, Any]) -> bytes:
    return pack("<IBBB", token["id"], token["special"], token["lstrip"], token["rstrip"]) + _text(token["content"])


def _chat(tokenizer: PreTrainedTokenizerBase) -> bytes:
    template = chat_template(tokenizer).encode()
    cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    begin, end = (str(token or "") for token in (tokenizer.bos_token, tokenizer.eos_token))
    return pack("<I", len(template)) + template + _text(end) + pack("<B", cleans) + _text(begin)


def _sequence(parts: Iterable[bytes]) -> bytes:
    made = list(parts)
    return pack("<I", len(made)) + b"".join(made)


def _has(part: dict[str, Any] | None, kind: str, within: str) -> bool:
    """Whether a part, or one of its sequence, is of this kind."""
    return part is not None and kind in (part["type"], *(each["type"] for each in part.get(within, ())))
