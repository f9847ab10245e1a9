"""A model's tokenizer: used as its files say, and handed on as the same files.

transformers 5 builds the tokenizers of some families anew, with the class's own rules for cutting text in place of
those in tokenizer.json. Engines read tokenizer.json, so its rules hold here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from upq.core.bounded import read_json
from upq.core.errors import UPQError
from upq.files.digests import TOKENIZER_FILES
from upq.files.tensors import plain_name

_INPUTS = ["input_ids", "attention_mask"]
_NAMED = ("bos", "eos", "pad", "unk")
# Of a model in tokenizer.json. Beside them it has its vocabulary, which every class takes from there.
_OPTIONS = (
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
    "ignore_merges",
)  # fmt: skip
_REMEDY = "is it a tokenizer's file?"


def tokenizer_files(model: Path) -> list[Path]:
    """The tokenizer's files in a model's directory, chat templates among them; never code."""
    found = {file for kind in TOKENIZER_FILES for file in model.glob(kind) if file.is_file() and file.suffix != ".py"}
    return sorted(found)


def as_stored(tokenizer: PreTrainedTokenizerBase, stored: Any) -> PreTrainedTokenizerBase:
    """`tokenizer` with the rules of `stored`, the content of its tokenizer.json (None: it has no such file).

    Law (tests/test_text_tokenizer.py): its ids of any text are those of `tokenizers.Tokenizer.from_file`.
    """
    tokenizer.model_input_names = list(_INPUTS)  # some classes add token types, which no decoder takes
    for name in _NAMED:
        if getattr(tokenizer, f"{name}_token") == "":  # for none: it has no id, and transformers looks for it for ever
            setattr(tokenizer, f"{name}_token", None)
    if stored is None or not tokenizer.is_fast:
        return tokenizer
    backend: Tokenizer = tokenizer.backend_tokenizer
    rules = Tokenizer.from_str(json.dumps(_without_vocabulary(stored)))
    backend.normalizer, backend.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    backend.decoder = rules.decoder
    for option in _OPTIONS:
        if hasattr(rules.model, option) and hasattr(backend.model, option):
            setattr(backend.model, option, getattr(rules.model, option))
    return tokenizer


def of_same_kind(tokenizer: PreTrainedTokenizerBase, stored: Any) -> bool:
    """Whether the class made the kind of model (BPE, Unigram …) that tokenizer.json, whose content is `stored`, has."""
    if not isinstance(stored, dict) or not tokenizer.is_fast:
        return True
    kind = stored["model"].get("type")  # older files do not say it
    return kind in (None, type(tokenizer.backend_tokenizer.model).__name__)


def class_tokens(tokenizer: PreTrainedTokenizerBase, stored: Any, model: Path) -> list[str]:
    """Names of special tokens that no file of `model` has: defaults of the tokenizer's class, which it adds as new ids.

    `stored`: the content of tokenizer.json.
    """
    if not isinstance(stored, dict) or not tokenizer.is_fast:
        return []
    vocabulary = stored["model"]["vocab"]  # a list of pairs for Unigram
    known = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    known |= {token["content"] for token in stored["added_tokens"]}
    named: set[str] = set()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model / name).is_file():
            named |= read_json(model / name, remedy=_REMEDY).keys()
    found = tokenizer.special_tokens_map.items()
    return [name for name, token in found if name not in named and str(token) not in known]


def _without_vocabulary(stored: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json with its rules alone: a vocabulary of 128,000 takes 0.6 s to read."""
    model = stored["model"]
    if model.get("type") not in ("BPE", "WordPiece"):
        return stored  # others are not read without a vocabulary
    empty: dict[str, Any] = {"vocab": {}, "merges": []} if model["type"] == "BPE" else {"vocab": {}}
    return {**stored, "model": {**model, **empty}, "added_tokens": []}


def check_ids(tokenizer: PreTrainedTokenizerBase, rows: int, where: str) -> None:
    """Raise UPQError where a token that is put in by name is beyond the embedding's `rows`."""
    for name in _NAMED:
        id = getattr(tokenizer, f"{name}_token_id")
        if id is not None and id >= rows:
            token = getattr(tokenizer, f"{name}_token")
            raise UPQError(
                f"{where}: the {name}_token {_beyond(token, id, rows)}, or name another in tokenizer_config.json"
            )


def check_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], rows: int, where: str) -> None:
    """Raise UPQError where one of `ids` is beyond the embedding's `rows`."""
    if ids and (id := max(ids)) >= rows:
        token = str(tokenizer.convert_ids_to_tokens(id))
        raise UPQError(f"{where}: the token {_beyond(token, id, rows)}, or take the token out of the text")


def _beyond(token: str, id: int, rows: int) -> str:
    return f"{token!r} has id {id}, and the model's embedding has {rows} rows; enlarge it with resize_token_embeddings"


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, out: Path, *, model: Path | None) -> None:
    """`tokenizer` in the directory `out`: the files of `model` that it was loaded from, byte for byte where it can be.

    Two files change where transformers 4 could not read them, which engines use. What is in no file of `model` is
    written: tokenizer.json of a tokenizer that came as a SentencePiece model, and all of one that came from no files.
    """
    if model is None:
        tokenizer.save_pretrained(out)
    else:
        for file in tokenizer_files(model):
            target = out / file.relative_to(model)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (out / name).is_file():
            raw = read_json(out / name, remedy=_REMEDY)
            if (older := _older(raw)) != raw:
                (out / name).write_text(json.dumps(older, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not (out / "tokenizer.json").is_file() and tokenizer.is_fast:
        tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    named = tokenizer.chat_template
    if isinstance(named, Mapping) and not (out / "chat_template.jinja").is_file():
        # Named templates came in tokenizer_config.json. Newer readers look for files.
        for name in named:
            plain_name(name, f"{model}: chat_template")
        tokenizer.save_chat_templates(out, {}, None, True)


def _older(raw: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's settings as transformers 4 spells them; transformers 5 reads both."""
    made = dict(raw)
    if str(made.get("tokenizer_class", "")).endswith("Backend"):
        made["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := made.get("extra_special_tokens"), list):
        del made["extra_special_tokens"]
        others = made.get("additional_special_tokens") or []
        made["additional_special_tokens"] = [*others, *(token for token in extra if token not in others)]
    if isinstance(named := made.pop("model_specific_special_tokens", None), dict):
        made["extra_special_tokens"] = {**named, **made.get("extra_special_tokens", {})}
    made.pop("auto_map", None)  # names code, which is not copied
    return made
