"""Checkpoints as they lie on people's disks: what is no model is one line with the remedy, before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import byte_tokenizer, tiny_model
from upq.core.errors import UPQError
from upq.model.loading import load_model, load_tokenizer
from upq.model.source import Source
from upq.model.walker import Replay

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456789\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "m"
    tiny_model("llama", vocab_size=256).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def change(model: Path, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = model / "model.safetensors"
    save_file({k: v.contiguous() for k, v in changed(load_file(file)).items()}, file, {"format": "pt"})


def sharded(model: Path, **names: str) -> None:
    """The checkpoint as one shard and an index; `names` of other shards that the index has for tensors."""
    file, shard = model / "model.safetensors", "model-00001-of-00001.safetensors"
    weight_map = {**dict.fromkeys(load_file(file), shard), **names}
    file.rename(model / shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def every_reader(model: Path) -> list[Callable[[], object]]:
    return [lambda: Source(model), lambda: load_model(model)]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer_is_fetched_with_git_lfs(model: Path, name: str) -> None:
    (model / name).write_text(POINTER)
    readers = [lambda: load_tokenizer(model)] if name.startswith("tokenizer") else every_reader(model)
    for reader in readers:
        with pytest.raises(UPQError, match=rf"m/{name}: a Git LFS pointer, .*; run `git lfs pull` in {model}$"):
            reader()


def test_pointers_that_are_not_read_do_no_harm(model: Path) -> None:
    for name in ("consolidated.safetensors", "pytorch_model.bin", ".gitattributes", "onnx.json"):
        (model / name).write_text(POINTER)
    assert len(Source(model)) == 2


def test_a_shard_that_is_a_pointer(model: Path) -> None:
    sharded(model)
    (model / "model-00001-of-00001.safetensors").write_text(POINTER)
    for reader in every_reader(model):
        with pytest.raises(UPQError, match=r"model-00001-of-00001\.safetensors: a Git LFS pointer"):
            reader()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("said", [False, True])
def test_weights_in_float8_without_a_word_of_it(model: Path, dtype: torch.dtype, every: bool, said: bool) -> None:
    change(model, lambda tensors: {k: v.to(dtype) if every or ".mlp." in k else v for k, v in tensors.items()})
    config = json.loads((model / "config.json").read_text())
    if not said:
        config.pop("dtype", None)
    (model / "config.json").write_text(json.dumps(config))
    kind = "I8" if dtype == torch.int8 else "float8"
    for reader in every_reader(model):
        with pytest.raises(UPQError, match=rf"tensor \S+weight is stored in {kind}, .*; give the model in BF16"):
            reader()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda m: (m / "model.safetensors").write_bytes(b""), r"model\.safetensors: damaged or truncated"),
        (lambda m: (m / "model.safetensors").unlink(), r"m: no model\.safetensors; is the download complete\?"),
        (
            lambda m: (m / "model.safetensors").rename(m / "consolidated.safetensors"),
            r"no model\.safetensors; found consolidated\.safetensors, which no model\.safetensors\.index\.json lists",
        ),
        (
            lambda m: (m / "config.json").write_bytes(b""),
            r"config\.json: cannot be read .*is config\.json of this model",
        ),
        (
            lambda m: sharded(m, **{"model.norm.weight": "model-00002-of-00002.safetensors"}),
            r"shard model-00002-of-00002\.safetensors named by the index is missing; is the download complete\?",
        ),
        (lambda m: sharded(m, **{"model.norm.weight": "config.json"}), r"config\.json: damaged or truncated"),
        (
            lambda m: change(m, lambda tensors: {k: v for k, v in tensors.items() if "layers.1" not in k}),
            r"tensor model\.layers\.1\.\S+ is missing from the checkpoint; is the download complete\?",
        ),
    ],
)
def test_what_is_not_there_is_named(model: Path, break_it: Callable[[Path], object], message: str) -> None:
    break_it(model)
    with pytest.raises(UPQError, match=message) as caught:
        load_model(model)
    assert "\n" not in str(caught.value)
    if "tensor" not in message:
        with pytest.raises(UPQError, match=message):
            Source(model)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("wish", ["flash_attention_2", "flash_attention_3", "flex_attention", "eager"])
def test_the_attention_of_another_machine_is_a_wish(model: Path, key: str, wish: str) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, key: wish}))
    expected = "eager" if wish == "eager" else "sdpa"
    assert load_model(model).config._attn_implementation == expected
    assert Source(model).empty().config._attn_implementation == expected


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_model_may_have_its_one_copy_under_either_name(kept: str, tmp_path: Path) -> None:
    made = tiny_model("llama", vocab_size=256, tie_word_embeddings=True)
    made.save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: {kept if k == "model.embed_tokens.weight" else k: v for k, v in tensors.items()})
    weight = made.model.embed_tokens.weight
    for model in (load_model(tmp_path), Source(tmp_path).without_blocks()):
        assert torch.equal(model.model.embed_tokens.weight, weight)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.tensor([[1, 5, 200]])
    assert torch.equal(Replay(Source(tmp_path)).call(0, ids).hidden_BTH, weight[ids])
