"""Files are data: a stranger's are read, or refused in one line, without running code or taking memory for a lie."""

from __future__ import annotations

import contextlib
import gzip
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import hostile
import upq
from hostile import TALK, with_file
from tiny import byte_tokenizer, tiny_model
from upq.artifact.manifest import read_manifest
from upq.artifact.size import weights_bytes
from upq.cli import _line
from upq.core import bounded
from upq.core.errors import UPQError
from upq.core.memory import peak_memory_bytes, resident_bytes
from upq.data import read_documents, sources, tokens
from upq.data.config import TextSource
from upq.data.conversations import ChatTemplate
from upq.exports._source import Source as Artifact
from upq.model.loading import load_model, load_tokenizer
from upq.model.source import Source
from upq.run.console import plain
from upq.run.recipe import Recipe
from upq.run.run import quantize

BOUND = 1 << 30
RECIPE = "int2: {bits: 2, method: {name: gptq}}\ndistill: {loss: gjs, tokens: 0, lr: 1e-3, scale_lr: 1e-3}\n"
few = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return hostile.models(tmp_path_factory.mktemp("valid"))


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """Whatever a test reads: at no time 1 GB more than before."""
    before = _peak_from_now()
    yield
    assert peak_memory_bytes() - before < BOUND


def _peak_from_now() -> int:
    before = peak_memory_bytes()
    with contextlib.suppress(OSError):  # Linux: sets the peak back to what is resident now
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_bytes()
    return before


def copy(directory: Path, to: Path) -> Path:
    return Path(shutil.copytree(directory, to))


def changed(directory: Path, name: str, change: Callable[[Any], object]) -> Path:
    """The directory, with a JSON file of it changed in place."""
    raw = json.loads((directory / name).read_text())
    change(raw)
    (directory / name).write_text(json.dumps(raw))
    return directory


def refusal(read: Callable[[], object], message: str) -> None:
    with pytest.raises(UPQError, match=message) as caught:
        read()
    assert "\n" not in str(caught.value)


# --- any change of a valid file ------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(hostile.ODD) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def mutations(draw: st.DrawFn, content: bytes, *, structured: bool) -> bytes:
    """`content` with a value of its JSON exchanged, added or left out, or with bytes overwritten or cut off."""
    if structured and draw(st.booleans()):
        return hostile.exchanged(content, draw(st.randoms(use_true_random=False)))
    raw = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(raw) - 1, 1500) if draw(st.booleans()) else len(raw) - 1))
        patch = draw(st.binary(min_size=1, max_size=9))
        raw[at : at + len(patch)] = patch
    return bytes(raw[: draw(st.integers(0, len(raw)))] if draw(st.integers(0, 3)) == 0 else raw)


@settings(few, max_examples=60)
@given(data=st.data())
def test_a_changed_model_is_read_or_refused(data: st.DataObject, valid: list[Path]) -> None:
    directory = data.draw(st.sampled_from(valid), label="directory")
    name = data.draw(st.sampled_from(sorted(file.name for file in directory.iterdir())), label="file")
    content = (directory / name).read_bytes()
    with with_file(directory, name, data.draw(mutations(content, structured=name.endswith(".json")))):
        hostile.read_model(directory)


@settings(few, max_examples=100)
@given(data=st.data())
def test_a_changed_recipe_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    recipe = Recipe.load("default")
    as_json = json.dumps(recipe.model_dump(mode="json")).encode()  # which is YAML as well
    text = data.draw(st.sampled_from([as_json, recipe.dump().encode(), RECIPE.encode()]))
    file = tmp_path / "recipe.yaml"
    file.write_bytes(data.draw(mutations(text, structured=text == as_json)))
    hostile.read_recipe(file)


@settings(few, max_examples=120)
@given(data=st.data())
def test_changed_data_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    name = data.draw(st.sampled_from(hostile.DATA))
    talks = [{"messages": hostile.CONVERSATION}] * 2
    rows = talks if data.draw(st.booleans()) else [{"text": "one"}, {"text": "zwö 二"}]
    file = tmp_path / name
    file.write_bytes(data.draw(mutations(hostile.data_file(name, rows), structured=name == "a.json")))
    hostile.read_data(file)


@settings(few, max_examples=60)
@given(data=st.data(), piece=st.integers(1, 9))
def test_an_array_in_pieces_is_the_array(data: st.DataObject, piece: int, tmp_path: Path) -> None:
    rows = [{"x": data.draw(JSON), "text": data.draw(st.text(min_size=1, max_size=9))} for _ in range(3)]
    text = json.dumps(rows, ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.sampled_from([None, 1])))
    file = tmp_path / "a.json"
    file.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_PIECE", piece)
        try:
            expected = json.loads(text.encode(errors="surrogatepass").decode())
        except UnicodeDecodeError:
            refusal(lambda: list(sources._items(file)), "not UTF-8 text at byte")
        else:
            assert repr(list(sources._items(file))) == repr(expected)  # NaN is not equal to itself


# --- JSON and YAML -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json", "upq.json"]
)
def test_depth_is_one_line(name: str, valid: list[Path]) -> None:
    read = {"upq.json": read_manifest, "tokenizer.json": load_tokenizer, "tokenizer_config.json": load_tokenizer}
    for deep in (b'{"a":' * 100_000, b"[" * 100 + b"]" * 100):
        with with_file(valid[0], name, deep) as directory:
            refusal(lambda: read.get(name, upq.load)(directory), rf"{name}: (cannot be read \(.*recursion|nested more)")


def test_many_values_in_few_bytes_are_refused_before_they_are_made(valid: list[Path]) -> None:
    many = b"[" + b"[]," * (10 << 20) + b"[]]"  # 30 MB that would take 700
    with with_file(valid[0], "upq.json", many) as directory:
        refusal(lambda: read_manifest(directory), r"upq\.json: more than 1,048,576 values")
    with with_file(valid[0], "upq.json", b'{"layers":[' + b"1," * 200_000 + b"1]}") as directory:
        refusal(lambda: read_manifest(directory), r"upq\.json: 200,002 values are not what they should be")
    with with_file(valid[0], "config.json", b" " * (bounded.FILE_BYTES + 1)) as directory:
        refusal(lambda: upq.load(directory), r"config\.json: larger than 33,554,432 bytes")


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 99))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, r"'a0' is an anchor or an alias; write its value out \(line 1\)"),
        ("a: 1\nb: *b", r"'b' is an anchor or an alias; write its value out \(line 2\)"),
        ("a: {<<: {b: 1}}\nc: &c {<<: *d}", r"'c' is an anchor or an alias"),
        ("seed: 1\nint2: {bits: 2}\nseed: 2", r"key 'seed' stands twice \(line 3\)"),
        ("int2:\n  bits: 2\n  'bits': 2", r"key 'bits' stands twice \(line 3\)"),
        ("[" + "{a: 1}, " * 10_000 + "]", "more than 10,000 values"),
        ("[" * 100_000, "nested more than 64 deep"),
        ("- " * 100_000, "nested more than 64 deep"),
        ("seed: 2001-99-99", "not valid YAML: month must be"),
        ("seed: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("seed: 0x" + "f" * 5000, "a number of 20,000 bits"),
        ("seed: !!python/object/apply:os.system [true]", "not valid YAML: could not determine a constructor"),
        ("name: " + "x" * 300_000, "longer than 262,144 characters"),
        ("name: \udcff", r"not UTF-8 text at byte 6"),
    ],
)
def test_yaml_is_bounded(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    refusal(lambda: Recipe.load(str(file)), rf"recipe .*a\.yaml: .*{message}")


def test_a_message_sends_nothing_to_the_terminal() -> None:
    shown = plain(_line(UPQError("key \x1b[2J\ud800\u202e of " + "x" * 10_000)))
    assert shown.startswith(r"key \x1b[2J\ud800\u202e of xxx")
    assert shown.encode().decode().isprintable()
    assert len(shown) < 3000


# --- file names ----------------------------------------------------------------------------------------------------

OUTSIDE = ["../outside.safetensors", "ABSOLUTE", "sub/model.safetensors", "..", "", "a\\b", "c:d"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_shards_are_files_of_the_directory(name: str, valid: list[Path], tmp_path: Path) -> None:
    model = copy(valid[1], tmp_path / "model")
    (model / "sub").mkdir()
    tensors = {k: v for file in model.glob("*.safetensors") for k, v in load_file(file).items()}
    name = name.replace("ABSOLUTE", str(tmp_path / "outside.safetensors"))
    for place in (tmp_path / "outside.safetensors", model / "sub" / "model.safetensors"):
        save_file(tensors, place, {"format": "pt"})
    changed(model, "model.safetensors.index.json", lambda raw: raw.update(weight_map=dict.fromkeys(tensors, name)))
    for read in (upq.load, Source, weights_bytes):
        refusal(lambda read=read: read(model), r"index\.json: names .* no file name of this directory")


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_manifest_lists_files_of_the_directory(name: str, valid: list[Path], tmp_path: Path) -> None:
    artifact = copy(valid[0], tmp_path / "artifact")
    name = name.replace("ABSOLUTE", str(tmp_path / "outside.safetensors"))
    changed(artifact, "upq.json", lambda raw: raw["files"].update({name: {"bytes": 0, "sha256": ""}}))
    refusal(lambda: Artifact.open(artifact), r"upq\.json: names .* no file name of this directory")


def test_a_hub_snapshot_is_made_of_links_and_loads(valid: list[Path], tmp_path: Path) -> None:
    for model in valid:
        blobs = copy(model, tmp_path / model.name / "blobs")
        snapshot = tmp_path / model.name / "snapshots" / "main"
        snapshot.mkdir(parents=True)
        for file in blobs.iterdir():
            (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / file.name)
        wanted = upq.load(model).state_dict()
        found = upq.load(snapshot).state_dict()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_model_of_the_hub_is_held_to_the_same(
    valid: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for n, model in enumerate(valid):
        repository = tmp_path / f"models--org--{n}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("a" * 40)
        snapshot = copy(model, repository / "snapshots" / ("a" * 40))
        assert type(upq.load(f"org/{n}")) is type(upq.load(model))
        changed(snapshot, "config.json", lambda raw: raw.update(head_dim=10**9))
        refusal(lambda n=n: upq.load(f"org/{n}"), "config.json says head_dim=1000000000, its weights are")
        for file in snapshot.glob("*.safetensors*"):
            file.unlink()
        refusal(lambda n=n: upq.load(f"org/{n}"), rf"^org/{n}: .*(pickles above all|cannot load)")


# --- sizes and shapes ----------------------------------------------------------------------------------------------

SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"]


@pytest.mark.parametrize("size", [10**12, 10**8, 0, -8])
@pytest.mark.parametrize("key", [*SIZES, "num_hidden_layers", "num_labels"])
def test_a_size_that_is_a_lie_is_refused_before_memory_is_taken(key: str, size: int, valid: list[Path]) -> None:
    if key == "num_labels" and size <= 0:
        return
    for model in valid:
        config = json.loads((model / "config.json").read_text()) | {key: size}
        with with_file(model, "config.json", json.dumps(config).encode()):
            for read in (upq.load, Source):
                refusal(lambda read=read, model=model: read(model), "config.json|AutoConfig")


def test_a_dense_model_is_compared_with_its_config(valid: list[Path], tmp_path: Path) -> None:
    """transformers would fill what is missing with random numbers, as many as config.json says."""
    name = "model.layers.1.mlp.up_proj.weight"
    model = tmp_path / "model"
    tiny_model("llama").save_pretrained(model)
    tensors = load_file(model / "model.safetensors")
    for wrong, message in (({}, f"tensor {name} is missing"), ({name: torch.zeros(43, 32)}, rf"{name} has shape \(43")):
        save_file({k: v for k, v in tensors.items() if k != name} | wrong, model / "model.safetensors")
        refusal(lambda: load_model(model), message)
    huge = changed(copy(valid[1], tmp_path / "huge"), "config.json", lambda raw: raw.update(num_hidden_layers=3))
    refusal(lambda: load_model(huge), r"tensor model\.layers\.2\..* is missing")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("linears", {"bits": bits}) for bits in (10**9, 0, "2", 2.5, True, None)),
        *(("linears", {"bits": 2, "group_size": size}) for size in (2.5, 10**12, 16, "x")),
        *(("linears", {"bits": 2, "grid": grid}) for grid in ("os", "../os", [], None)),
        ("linears", {"bits": 2, "scale_dtype": "load"}),
        *(("overrides", value) for value in (5, {"x": 0}, {"x": None}, {"model.layers.0.mlp.up_proj": 0})),
        *(("embeddings", value) for value in (5, 0, [], {"bits": 8})),
        *(("format_version", value) for value in ("x", None, [], 1.5)),
    ],
)
def test_the_quantisation_is_checked_against_the_tensors(key: str, value: Any, valid: list[Path]) -> None:
    config = json.loads((valid[0] / "config.json").read_text())
    config["quantization_config"][key] = value
    with with_file(valid[0], "config.json", json.dumps(config).encode()) as directory:
        for read in (upq.load, Artifact.open):
            refusal(lambda read=read: read(directory), ".")


def test_a_header_that_is_larger_than_its_file_is_refused(valid: list[Path], tmp_path: Path) -> None:
    artifact = copy(valid[0], tmp_path / "artifact")
    for size, shape in ((2**62, [1]), (8, [2**40]), (2**63 + 8, [2**40, 2**40]), (0, [0, 2**60])):
        header = json.dumps({"x": {"dtype": "U8", "shape": shape, "data_offsets": [0, size]}}).encode()
        (artifact / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        refusal(lambda: upq.load(artifact), r"model\.safetensors: damaged|weights are")
    (artifact / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    refusal(lambda: upq.load(artifact), r"model\.safetensors: damaged")


# --- code ----------------------------------------------------------------------------------------------------------


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    model = tmp_path / "model"
    original = tiny_model("llama")
    original.save_pretrained(model)
    byte_tokenizer(bos="<s>", eos="</s>").save_pretrained(model)
    (model / "model.safetensors").unlink()
    marker = tmp_path / "marker"
    for name in ("pytorch_model.bin", "model.pt"):
        (model / name).write_bytes(pickle.dumps(_Bomb(marker)))
        for read in (upq.load, Source):
            refusal(lambda read=read: read(model), rf"{name}, a pickle, .* python -c")
        (model / name).unlink()
    assert not marker.exists()

    torch.save(original.state_dict(), model / "pytorch_model.bin")
    with pytest.raises(UPQError) as caught:
        upq.load(model)
    command = re.search(r'python -c "(.*)"$', str(caught.value))
    assert command is not None
    exec(command.group(1), {})
    converted = upq.load(tmp_path / "model-safe").state_dict()
    assert all(torch.equal(converted[key], value) for key, value in original.state_dict().items())
    load_tokenizer(tmp_path / "model-safe")


def test_code_beside_a_model_is_not_run(valid: list[Path], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import *\nclass Evil: pass\n"
    for n, valid_model in enumerate(valid):
        model = copy(valid_model, tmp_path / str(n))
        for name in ("evil.py", "__init__.py", "tokenizer.py", "custom_generate/generate.py", "sitecustomize.py"):
            (model / name).parent.mkdir(exist_ok=True)
            (model / name).write_text(code)
        classes = dict.fromkeys(["AutoConfig", "AutoModel", "AutoModelForCausalLM"], "evil.Evil")
        changed(model, "config.json", lambda raw, classes=classes: raw.update(auto_map=classes))
        changed(model, "tokenizer_config.json", lambda raw: raw.update(auto_map={"AutoTokenizer": ["evil.Evil"] * 2}))
        upq.load(model)
        load_tokenizer(model)
        if n:
            Source(model)
        else:
            Artifact.open(model)
        changed(model, "config.json", lambda raw: raw.update(model_type="evil"))
        refusal(lambda model=model: upq.load(model), "knows no model_type 'evil'; its own code \(auto_map\) is not run")
    assert not marker.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_code_on_the_hub_is_not_fetched(key: str, valid: list[Path]) -> None:
    config = json.loads((valid[0] / "config.json").read_text())
    for value in ("evil/kernel", {"": "evil/kernel@main:run"}):
        with with_file(valid[0], "config.json", json.dumps(config | {key: value}).encode()) as directory:
            refusal(lambda directory=directory: upq.load(directory), "names code on the hub, which is not run")


def test_a_model_does_not_lead_to_another(valid: list[Path], tmp_path: Path) -> None:
    model = copy(valid[1], tmp_path / "model")
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/base"}')
    refusal(lambda: load_model(model), "holds an adapter .*merge it")
    (model / "adapter_config.json").unlink()
    changed(model, "config.json", lambda raw: raw.update(transformers_weights="other.safetensors"))
    refusal(lambda: load_model(model), r"transformers_weights must be model\.safetensors")


TEMPLATES = [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''|attr('__class__') ~ (''|attr('__class__')).mro() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ namespace.__init__.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "{{ raise_exception.__globals__['datetime'] }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ messages.append(1) }}",
    "{% include 'MARKER' %}",
    "{% import os %}",
    "{{ (1).__class__.__base__ }}{{ open('MARKER', 'w') }}",
    "{{ range(1000000)|list }}",
    "{{ 1 / 0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages[99].content.x.y }}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{% for",
]


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_a_chat_template_reaches_nothing(template: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    tokenizer = byte_tokenizer(bos="<s>", eos="</s>", chat_template=template.replace("MARKER", str(marker)))
    refusal(lambda: ChatTemplate(tokenizer).render(TALK, "row 1"), "^row 1: the chat template refuses")
    refusal(lambda: ChatTemplate(tokenizer).encode_marked(TALK, "row 1"), "^row 1: the chat template refuses")
    assert not marker.exists()


# --- data ----------------------------------------------------------------------------------------------------------


def documents(file: Path, **options: Any) -> list[Any]:
    return [document.content for document in read_documents(TextSource(path=str(file), **options))]


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("a.jsonl.gz", sources.ROW_BYTES, r"a\.jsonl\.gz:1: a document of more than 32 MB; split the row"),
        ("a.json.gz", sources.ROW_BYTES, r"a\.json\.gz:1: a document of more than 32 MB; split the row"),
        ("a.txt.gz", sources.TEXT_BYTES, r"a\.txt\.gz: a document of more than 128 MB; .*blank_line"),
    ],
)
def test_a_small_file_of_gigabytes_is_read_no_further_than_one_document(
    name: str, size: int, message: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    with gzip.open(file, "wb", compresslevel=1) as out:
        out.write(b'[{"text": "' if "json" in name else b"")
        for _ in range((2 * size >> 20) if "json" in name else (size >> 20) + 1):
            out.write(b"a" * (1 << 20))
    assert file.stat().st_size < 1 << 20
    refusal(lambda: documents(file), message)


def test_lists_of_a_row_are_bounded_by_its_bytes(tmp_path: Path) -> None:
    """A quarter of the longest row, of what takes most memory: it may take a quarter of the bound."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"x": [' + b"[]," * (sources.ROW_BYTES // 4 // 3) + b'1], "text": "x"}')
    before = _peak_from_now()
    assert documents(file) == ["x"]
    assert peak_memory_bytes() - before < BOUND // 4


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_deep_row_is_one_line(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text('[{"text": "x"},\n' if name == "a.json" else '{"text": "x"}\n')
    with file.open("a") as out:
        out.write("[" * 1_000_000)
    refusal(lambda: documents(file), rf"{name}:2: invalid JSON \(.*recursion")


def test_text_in_parquet_that_is_none_is_one_line(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": raw}), tmp_path / "a.parquet")
    refusal(lambda: documents(tmp_path / "a.parquet"), r"a\.parquet: not a readable parquet file .*utf-8")


# --- a run's own files ---------------------------------------------------------------------------------------------


def test_rows_that_are_no_rows_are_made_anew(tmp_path: Path) -> None:
    good = {"tokens": torch.zeros(2, 3, dtype=torch.int32), "validation_tokens": torch.zeros(1, 3, dtype=torch.int32)}
    metadata = {"key": "k", "digest": "d", "sources": "[]"}
    file = tmp_path / "tokens.safetensors"
    save_file(good, file, metadata)
    assert tokens.read(file, "k", 0) is not None
    for tensors, described in (
        (good, metadata | {"sources": "[" * 100_000}),
        (good, metadata | {"sources": "[1]"}),
        (good, {"key": "k"}),
        ({"tokens": good["tokens"]}, metadata),
        (good | {"tokens": torch.zeros(6)}, metadata),
    ):
        save_file(tensors, file, described)
        assert tokens.read(file, "k", 0) is None


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{}", '{"model": 1, "recipe": {}, "seconds": {}}', "\xff"])
def test_the_state_of_a_run_is_read_or_refused(text: str, valid: list[Path], tmp_path: Path) -> None:
    work = tmp_path / "out" / ".work"
    work.mkdir(parents=True)
    (work / "run.json").write_bytes(text.encode("latin-1"))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE)
    given = Recipe.load(str(recipe), ["data.seq_len=32"])
    refusal(lambda: quantize(valid[1], given, tmp_path / "out"), r"run\.json: ")
