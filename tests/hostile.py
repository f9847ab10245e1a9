"""What must hold for any file a stranger may hand over, as one function a kind: it is read, or UPQError says why not.

tests/test_hostile.py and tools/fuzz.py call the same functions, on inputs of their own making.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers.utils import logging

import upq
from tiny import CHAT, byte_tokenizer, tiny_artifact, tiny_model
from upq.artifact.manifest import read_manifest, verify
from upq.artifact.transformers import write_companions
from upq.cli.chat import answer
from upq.core.errors import UPQError
from upq.core.progress import Silent
from upq.data import Message, read_documents
from upq.data.config import Generated, TextSource
from upq.data.conversations import ChatTemplate
from upq.data.encoding import Encoder
from upq.data.generated import check, write_conversations
from upq.exports._source import Source as Artifact
from upq.losses import LOSSES
from upq.model.loading import embedding_rows, load_config, load_tokenizer
from upq.model.source import Source
from upq.run.dry import check_text
from upq.run.recipe import Recipe
from upq.run.run import quantize
from upq.stages.blockwise import Blockwise
from upq.stages.distill import Distill
from upq.text.generation import end_tokens
from upq.text.tokenizer import check_ids

TALK = (Message("user", "Hi"), Message("assistant", "Ho"))
CONVERSATION = [{"role": message.role, "content": message.content} for message in TALK]
ODD: list[Any] = [None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**12, 0.5, 1e308, float("nan"), float("inf")]
ODD += ["", "..", "/", "a/b", "float16", "\ud800", "\0", [], {}]
DATA = ("a.txt", "a.jsonl", "a.json", "a.txt.gz", "a.jsonl.gz", "a.parquet")

logging.set_verbosity_error()
logging.disable_progress_bar()


def models(root: Path) -> list[Path]:
    """Valid directories to start from: an artefact, and a dense model in shards."""
    dense = root / "dense"
    tiny_model("llama", vocab_size=300, eos_token_id=257).save_pretrained(dense, max_shard_size="20KB")
    byte_tokenizer(bos="<s>", eos="</s>", chat_template=CHAT).save_pretrained(dense)
    artifact = tiny_artifact(root / "artifact")
    (artifact / "upq.json").write_bytes(unsigned(artifact))
    return [artifact, dense]


def unsigned(artifact: Path) -> bytes:
    """The manifest without a digest of what is going to be changed, as an attacker would do it."""
    raw = json.loads((artifact / "upq.json").read_text())
    return json.dumps(raw | {"files": {"model.safetensors": raw["files"]["model.safetensors"]}}).encode()


def data_file(name: str, rows: list[dict[str, Any]]) -> bytes:
    """A valid file of one of DATA's names."""
    if name.endswith(".parquet"):
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), out)
        return out.getvalue()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    text = json.dumps(rows, indent=1) if name == "a.json" else text
    return gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text.encode()


def exchanged(text: bytes, choose: random.Random) -> bytes:
    """JSON with one value of it, at any depth, exchanged for an odd one, left out or cut short."""
    return json.dumps(_exchanged(json.loads(text), choose)).encode(errors="surrogatepass")


def _exchanged(value: Any, choose: random.Random) -> Any:
    if not isinstance(value, dict | list) or not value or choose.random() < 0.1:
        odd = choose.choice(ODD)
        return choose.choice([odd, odd, [odd], {"a": odd}, str(odd), [odd, value]])
    key = choose.choice(list(value)) if isinstance(value, dict) else choose.randrange(len(value))
    if choose.random() < 0.1:
        return {k: v for k, v in value.items() if k != key} if isinstance(value, dict) else value[:key]
    inner = _exchanged(value[key], choose)
    return {**value, key: inner} if isinstance(value, dict) else [*value[:key], inner, *value[key + 1 :]]


def read_model(directory: Path) -> None:
    """An artefact or a dense model, by every way there is into it."""
    with _refused():
        upq.load(directory)
    with _refused():
        tokenizer = load_tokenizer(directory)
        template = ChatTemplate(tokenizer)
        if template.source is not None:
            template.render(TALK, "here")
    with _refused():
        source = Artifact.open(directory)
        source.ends(), source.companions()
    with _refused():
        Source(directory).block(0)


def read_recipe(file: Path) -> None:
    with _refused():
        recipe = Recipe.load(str(file))
        for stage in recipe.stages.values():
            if isinstance(stage, Blockwise):
                stage.scheme()
                stage.solver()
            elif isinstance(stage, Distill):
                stage.loss.options(LOSSES.get(stage.loss.name).Config, "loss")
        assert Recipe.load(str(file)) == recipe


def read_data(file: Path) -> None:
    tokenizer = byte_tokenizer(bos="<s>", eos="</s>", chat_template=CHAT)
    for separator in ("none", "blank_line"):
        with _refused():
            documents = list(read_documents(TextSource(path=str(file), separator=separator)))
            Encoder(tokenizer).encode(documents)


# --- a template, tokenizer settings and generation settings of all kinds ---------------------------------------------

HEADS = (
    "",
    "{{ bos_token }}",
    "<|im_start|>system\nToday: {{ strftime_now('%d %b %Y %H:%M:%S') }}<|im_end|>\n",
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
    "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}",
    "{% if (messages | length) % 2 == 0 %}{{ raise_exception('roles must alternate') }}{% endif %}",
    "{% if tools %}{{ tools | tojson }}{% endif %}",
    "{{ tools[0].function.name }}",
    "{{ messages[7].content }}",
    "{{ strftime_now(5) }}",
    "<|tool|>",
)
FORMS = (
    ("<|im_start|>{{ m.role }}\n", "{{ m.content }}", "<|im_end|>\n"),
    ("[INST] ", "{{ m.content }}", " [/INST]"),
    ("", "{{ m.content }}", "{{ eos_token }}"),
    ("", "{{ m.content }}", ""),
    (" ", "{{ m.content | trim }}", " "),
    ("{{ m.role }}: ", "{{ m.content | upper }}", "\n\n"),
    ("### Instruction:\n", "{{ m['content'] }}", "\n\n### Response:\n"),
    ("", "{% generation %}{{ m.content }}{% endgeneration %}", "<|im_end|>"),
    ("<|im_start|>", "", "<|im_end|>"),
    ("", "{{ m.content }}{{ m.content }}", ""),
    ("", "{{ m.content[0].text }}", ""),
    ("", "{{ m.content[:2] }}", ""),
)
PROMPTS = ("", "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "Assistant:")
TOKENS = (..., "<|im_end|>", "<|endoftext|>", None, "<s>", "[NEW]", "a", "", 5, {"content": "<x>"}, ["<|im_end|>"])
CLASSES: tuple[Any, ...] = ("PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", "GPT2Tokenizer", ..., 5)
EXTRA: tuple[Any, ...] = (..., ["<|im_start|>"], {"image_token": "<|im_start|>"}, ["[MORE]"], "x", 5)
ENDS: tuple[Any, ...] = (258, [258, 256], None, [], ..., 999, -1, "</s>", [None], 2.5, True)
GENERATION: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (5.0, 0.0, "x"),
    "num_beams": (4, 0),
    "num_return_sequences": (2,),
    "max_new_tokens": (4, 0, None),
    "max_length": (1, 20),
    "min_new_tokens": (30,),
    "min_p": (0.5,),
    "temperature": (0.7, 0.0, None),
    "top_k": (1, -1),
    "do_sample": (False, True),
    "suppress_tokens": ([10, 11], [999]),
    "begin_suppress_tokens": ([258],),
    "forced_eos_token_id": (258,),
    "use_cache": (False,),
    "cache_implementation": ("static", "nonsense"),
    "return_dict_in_generate": (True,),
    "stop_strings": ("e",),
    "no_repeat_ngram_size": (1,),
    "prompt_lookup_num_tokens": (3,),
    "pad_token_id": (256, 999, None),
    "guidance_scale": (2.0,),
    "a_key_of_tomorrow": ({"a": 1},),
}


def input_of(raw: bytes) -> dict[str, Any]:
    """An input described by its choices, a byte for each: of the lower half the plain one, which is the first.

    So most inputs get past the first check. What is past the end of `raw` is plain too.
    """
    left = iter(raw)

    def pick(options: Sequence[Any]) -> Any:
        byte = next(left, 0)
        return options[0 if byte < 128 else byte % len(options)]

    user, answer = pick(FORMS), pick(FORMS[:9])
    if pick((False, False, True)):
        user, answer = answer, user
    body = "{% for m in messages %}{% if m.role == 'user' %}USER{% else %}ANSWER{% endif %}{% endfor %}"
    template = pick(HEADS) + body.replace("USER", "".join(user)).replace("ANSWER", "".join(answer)) + pick(PROMPTS)
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "{{ tools }}"}]
    settings = {
        "chat_template": pick((template, named, template, named[1:], None, 5, "{{", [])),
        "tokenizer_class": pick(CLASSES),
        "extra_special_tokens": pick(EXTRA),
        "add_bos_token": pick((..., True, False, "x")),
        "model_max_length": pick((..., 8, None, 1e30)),
        **{f"{name}_token": pick(TOKENS) for name in ("eos", "pad", "bos", "unk")},
    }
    generation: Any = {"eos_token_id": pick(ENDS)}
    for _ in range(pick((0, 1, 2, 3))):
        key = pick(tuple(GENERATION))
        generation[key] = pick(GENERATION[key])
    return {
        "tokenizer_config.json": _given(settings),
        "generation_config.json": pick((_given(generation), _given(generation), None, {}, [], 5)),
        "config.json": _given({"eos_token_id": pick((258, None, [258], ...)), "use_cache": pick((True, False))}),
        "beyond": pick((False, False, True)),  # an added token without a row in the embedding
        "loss_on": pick(("all", "assistant")),
        "generated": pick((True, False)),
    }


def _given(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if value is not ...}


def base(folder: Path) -> Path:
    """A model of 259 rows, one token a byte and three special ones, to put the files of an input into."""
    tiny_model("llama", vocab_size=259, hidden_size=16, eos_token_id=258).save_pretrained(folder)
    tokenizer = byte_tokenizer(bos="<|endoftext|>", eos="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    rows = [{"messages": CONVERSATION}, {"text": "plain"}, {"text": "<|tool|> result"}, {"messages": CONVERSATION[:1]}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_input(base: Path, folder: Path, raw: bytes) -> dict[str, Any]:
    """The directory `folder`: that of `base` with the files of `input_of(raw)`, which is returned."""
    made = input_of(raw)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
        if made[name] is not None:
            (folder / name).write_text(json.dumps(made[name]))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | made["config.json"]))
    if made["beyond"]:
        stored = json.loads((folder / "tokenizer.json").read_text())
        stored["added_tokens"].append({**stored["added_tokens"][-1], "id": 259, "content": "<|tool|>"})
        (folder / "tokenizer.json").write_text(json.dumps(stored))
    return made


def use_input(model: Path, made: dict[str, Any]) -> None:
    """All that reads a template, a tokenizer or generation settings, in the order of a run."""
    options = [f"data.loss_on={made['loss_on']}", "data.seq_len=8"]
    recipe = Recipe.load("default", options).changed([f"data.sources=[{{path: {model / 'rows.jsonl'}}}]"])
    section = Generated(tokens=4, max_new_tokens=6, batch_size=2)
    with _refused():
        tokenizer = load_tokenizer(model)
        with _refused():
            check_text(model, load_config(model), tokenizer, recipe, "model")
        loaded = upq.load(model)
        with _refused():  # behind the checks of a run, without those of the rows
            rows = embedding_rows(loaded.config)
            check_ids(tokenizer, rows, "model")
            check(tokenizer, end_tokens(loaded.generation_config, tokenizer), rows)
            write_conversations(model / "talks", loaded, tokenizer, section, seed=0, progress=Silent())
        with _refused():
            answer(loaded, tokenizer, CONVERSATION[:1], {"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0})
        for document in read_documents(TextSource(path=str(model / "rows.jsonl"))):
            with _refused():
                Encoder(tokenizer, made["loss_on"]).encode([document])
        (model / "out").mkdir()
        write_companions(model / "out", tokenizer, model)
        shutil.copyfile(model / "config.json", model / "out" / "config.json")
        again = load_tokenizer(model / "out")
        text = "In 2023 <|im_start|>ö"
        assert (
            again(text, add_special_tokens=False)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        )


def run_input(model: Path, made: dict[str, Any]) -> None:
    """A whole run: an artefact that is used with the tokens of its source, or one line."""
    out = model / "run"
    settings = [
        f"data.sources=[{{path: {model / 'rows.jsonl'}}}]",
        f"data.loss_on={made['loss_on']}",
        "data.seq_len=8",
        "data.validation=1",
        f"data.generated={'{tokens: 4, max_new_tokens: 6, batch_size: 2}' if made['generated'] else 'null'}",
        "int2.samples=4",
        "int2.method=rtn",
        "distill.tokens=16",
        "distill.batch_size=2",
    ]
    with _refused():
        quantize(model, Recipe.load("default", settings), out)
        verify(out, read_manifest(out))
        upq.load(out)
        ids = [load_tokenizer(path)("In 2023 <|im_start|>ö", add_special_tokens=False) for path in (model, out)]
        assert ids[0]["input_ids"] == ids[1]["input_ids"]


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    said = ""
    try:
        yield
    except UPQError as error:
        said = str(error)
    assert "\n" not in said


@contextlib.contextmanager
def with_file(directory: Path, name: str, content: bytes) -> Iterator[Path]:
    """The directory with one file exchanged; as it was, afterwards."""
    file = directory / name
    kept = file.read_bytes() if file.is_file() else None
    file.write_bytes(content)
    try:
        yield directory
    finally:
        file.unlink()
        if kept is not None:
            file.write_bytes(kept)
