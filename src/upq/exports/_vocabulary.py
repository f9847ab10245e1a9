"""A tokenizer in llama.cpp's terms: its kind, its tokens and what joins them.

llama.cpp knows two kinds that matter here. `gpt2` is byte-level BPE with one of a fixed set of pre-tokenizers, named in
`tokenizer.ggml.pre`; its converter finds the name by the hash of an encoded text, here it is found by the regular
expressions themselves. `llama` is SentencePiece's BPE, which joins the neighbours whose union has the highest score.
What neither can reproduce is refused: a model with another tokenizer than it was trained with talks nonsense.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import gguf
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from upq.core.errors import UPQError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _ENDINGS
    + r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _ENDINGS
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
# (expressions, whole words win over merges) to the name in llama-vocab.cpp
_PRE: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"
_AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Everything below `tokenizer.` in a GGUF file. Lists run over ids."""

    model: str
    tokens: list[str]
    types: list[int]
    special: dict[str, int]  # bos, eos, … to id
    add_bos: bool
    add_eos: bool
    pre: str | None = None
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool | None = None
    chat_template: str | None = None
    notes: tuple[str, ...] = ()

    def describe(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, id in self.special.items():
            getattr(writer, f"add_{name}_token_id")(id)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, ends: list[int]) -> Vocabulary:
    """`tokenizer` for an embedding of `size` rows. `ends`: the ids on which the model stops."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UPQError("gguf: the tokenizer has no tokenizer.json; save it with a fast tokenizer first")
    raw = json.loads(backend.to_str())
    model, added = raw["model"], {token["id"]: token for token in raw["added_tokens"]}
    steps, normalizers = _steps(raw["pre_tokenizer"], "pretokenizers"), _steps(raw["normalizer"], "normalizers")
    if model["type"] != "BPE":
        raise UPQError(f"gguf: llama.cpp's tokenizers here are BPE; this one is {model['type']}")
    by_id = {id: token for token, id in model["vocab"].items()} | {id: token["content"] for id, token in added.items()}
    if max(by_id) >= size:
        raise UPQError(f"gguf: the tokenizer has an id {max(by_id)}, the embedding only {size} rows")
    tokens = [by_id.get(id, f"[PAD{id}]") for id in range(size)]
    if len(set(tokens)) != size:
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise UPQError(f"gguf: two ids have the token {twice!r}; llama.cpp wants each token once")
    special = {
        name: id
        for name in ("bos", "eos", "unk", "sep", "pad", "mask")
        if (id := getattr(tokenizer, f"{name}_token_id", None)) is not None
    }
    if others := [id for id in ends if id != special.get("eos")]:
        special |= {"eos": others[0]} if "eos" not in special else {"eot": others[0]}
    ids = tokenizer("a").input_ids
    common: dict[str, Any] = {
        "tokens": tokens,
        "special": special,
        "add_bos": bool(ids) and ids[0] == special.get("bos"),
        "add_eos": bool(ids) and ids[-1] == special.get("eos"),
        "chat_template": _template(tokenizer),
    }
    if any(step["type"] == "ByteLevel" for step in steps):
        return Vocabulary(**common, **_byte_level(model, added, size, by_id, steps, normalizers))
    return Vocabulary(**common | _sentencepiece(model, added, tokens, by_id, steps, normalizers))


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [part]


def _byte_level(
    model: dict[str, Any],
    added: dict[int, dict[str, Any]],
    size: int,
    by_id: dict[int, str],
    steps: list[dict[str, Any]],
    normalizers: list[dict[str, Any]],
) -> dict[str, Any]:
    notes = []
    for step in normalizers:
        if step["type"] != "NFC":
            raise UPQError(f"gguf: llama.cpp's BPE does not normalise text; this tokenizer does ({step['type']})")
        notes.append("llama.cpp does not normalise text: what is not in Unicode's form NFC is split differently")
    expressions = tuple(pattern for step in steps if (pattern := _expression(step)) is not None)
    # without merges every byte is a token, however the text is cut
    pre = _PRE.get((expressions, bool(model["ignore_merges"]))) if model["merges"] else "gpt-2"
    if pre is None and model["ignore_merges"]:
        pre = _PRE.get((expressions, False))
        if pre is not None and (lost := _beyond_merges(model)) is not None:
            raise UPQError(f"gguf: llama.cpp joins merges here, and no merges of this tokenizer make {lost!r}")
    if pre is None:
        shown = " then ".join(expressions) or "none"
        raise UPQError(f"gguf: llama.cpp has no pre-tokenizer for {shown} (ignore_merges: {model['ignore_merges']})")
    types = [int(_type(id, added) if id in by_id else gguf.TokenType.UNUSED) for id in range(size)]
    merges = _merges(model) or [_UNREACHABLE]
    return {"model": "gpt2", "pre": pre, "types": types, "merges": merges, "notes": tuple(notes)}


def _beyond_merges(model: dict[str, Any]) -> str | None:
    """A token that its merges do not make. Without one, it is the same whether whole words win over merges."""
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    joined = Tokenizer(models.BPE(vocab=model["vocab"], merges=pairs))
    tokens = list(model["vocab"])
    made = joined.encode_batch(tokens, add_special_tokens=False)
    return next((token for token, ids in zip(tokens, made, strict=True) if len(ids.ids) != 1), None)


def _expression(step: dict[str, Any]) -> str | None:
    """The regular expression by which a step cuts text; None where it only renames bytes."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return _GPT2 if step["use_regex"] else None
    if kind == "Digits" and step["individual_digits"]:
        return r"\p{N}"
    # isolating the matches, or dropping what is between them where the expression matches everything
    if kind == "Split" and (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True)):
        pattern: str | None = step["pattern"].get("Regex")
        if pattern is not None:
            return pattern
    raise UPQError(f"gguf: llama.cpp has no pre-tokenizer for {json.dumps(step)}")


def _sentencepiece(
    model: dict[str, Any],
    added: dict[int, dict[str, Any]],
    tokens: list[str],
    by_id: dict[int, str],
    steps: list[dict[str, Any]],
    normalizers: list[dict[str, Any]],
) -> dict[str, Any]:
    prefix, notes = False, []
    for step in normalizers:
        if step == {"type": "Prepend", "prepend": _SPACE}:
            prefix = True
        elif step != {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}:
            raise UPQError(f"gguf: llama.cpp's SentencePiece has no {json.dumps(step, ensure_ascii=False)}")
    replaced = any(step["type"] == "Replace" for step in normalizers)
    for step in steps:
        if replaced and step == _AT_SPACES:  # of which none is left
            continue
        if step["type"] != "Metaspace" or step["replacement"] != _SPACE or step.get("split"):
            raise UPQError(f"gguf: llama.cpp's SentencePiece has no {json.dumps(step, ensure_ascii=False)}")
        prefix = step["prepend_scheme"] != "never"
        if step["prepend_scheme"] == "first":
            notes.append("llama.cpp puts a space in front of text after a special token too; this tokenizer does not")
    if not model["byte_fallback"]:
        raise UPQError("gguf: llama.cpp's SentencePiece falls back on bytes; this tokenizer does not")
    unknown = model.get("unk_token")
    types = []
    for id, token in enumerate(tokens):
        if id not in by_id:
            kind = gguf.TokenType.UNUSED
        elif token == unknown:
            kind = gguf.TokenType.UNKNOWN
        elif _BYTE.fullmatch(token):
            kind = gguf.TokenType.BYTE
        else:
            kind = _type(id, added)
        types.append(int(kind))
    # These llama.cpp looks for in the text as it stands.
    defined = gguf.TokenType.USER_DEFINED
    own = [t.replace(_SPACE, " ") if kind == defined else t for t, kind in zip(tokens, types, strict=True)]
    return {
        "model": "llama",
        "tokens": own,
        "types": types,
        "scores": _scores(model, {token["content"] for token in added.values()}, tokens),
        "space_prefix": prefix,
        "notes": tuple(notes),
    }


def _scores(model: dict[str, Any], added: set[str], tokens: list[str]) -> list[float]:
    """A score a token such that joining by the highest score is joining by the lowest rank.

    The two agree where the merges are those of a SentencePiece model: every way to cut a token into two tokens is a
    merge, and the ways to make one token follow each other in rank.
    """
    ranks = {tuple(pair.split(" ") if isinstance(pair, str) else pair): i for i, pair in enumerate(model["merges"])}
    made: dict[str, list[int]] = {}
    for (left, right), rank in ranks.items():
        made.setdefault(left + right, []).append(rank)
    known = {token for token in model["vocab"] if token not in added and not _BYTE.fullmatch(token)}
    for token in known:
        cuts = {(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in known and token[i:] in known}
        own = made.get(token, [])
        if len(cuts) != len(own) or (own and max(own) - min(own) != len(own) - 1):
            raise UPQError(
                f"gguf: the merges of {token!r} are no SentencePiece model's; llama.cpp would split it wrong"
            )
    order = {token: i for i, token in enumerate(sorted(made, key=lambda token: made[token][0]))}
    return [-float(order[token]) if token in order else 0.0 for token in tokens]


# llama.cpp does not load a vocabulary without merges. Text is cut into single letters first, so none is ever a pair.
_UNREACHABLE = "ĠĠ ĠĠ"


def _merges(model: dict[str, Any]) -> list[str]:
    # a space within a part would be read as the one between the parts; it is byte 32 as the alphabet writes it
    parts = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in parts]


def _type(id: int, added: dict[int, dict[str, Any]]) -> gguf.TokenType:
    if id not in added:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if added[id]["special"] else gguf.TokenType.USER_DEFINED


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template. transformers' own `generation` blocks, which mark text and print nothing, become `if true`."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        return None
    template = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", template)
