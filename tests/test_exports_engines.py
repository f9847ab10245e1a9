"""What is written for engines is what they compute: keys that transformers 4 reads, heads and biases of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tiny import artifact_of, tiny_artifact, tiny_model
from upq.core.errors import UPQError
from upq.exports import export
from upq.exports._older import older_keys
from upq.exports._source import Source
from upq.exports.compressed_tensors import CompressedTensors
from upq.exports.mlx import Mlx, MlxOptions
from upq.exports.onnx import _genai

ROPES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "default": ({"rope_type": "default", "rope_theta": 1e6}, None),
    "linear": (
        {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
        {"rope_type": "linear", "factor": 2.0},
    ),
    "yarn": (
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "llama3": (
        {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_positions_in_both_spellings(kind: str, tmp_path: Path) -> None:
    """transformers 4 reads `rope_theta` and `rope_scaling`; version 5 reads the same from both together."""
    rope, scaling = ROPES[kind]
    artifact = tiny_artifact(tmp_path / "artifact", rope_parameters=rope)
    export(artifact, "dense", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (found["rope_theta"], found["rope_scaling"]) == (rope["rope_theta"], scaling)
    assert found["torch_dtype"] == found["dtype"]
    five = json.loads((artifact / "config.json").read_text())
    del five["quantization_config"]
    (tmp_path / "five").mkdir()
    (tmp_path / "five" / "config.json").write_text(json.dumps(five))
    five, both = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("five", "out"))
    assert five | {"_name_or_path": ""} == both | {"_name_or_path": ""}


@pytest.mark.parametrize("name", ["compressed_tensors", "gptq", "humming", "torchao", "onnx", "openvino"])
def test_every_directory_has_the_older_keys(name: str, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", rope_parameters=ROPES["default"][0])
    try:
        export(artifact, name, tmp_path / "out", options={"allow_inexact": True})
    except UPQError as error:
        pytest.skip(str(error))
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (found["rope_theta"], found["torch_dtype"]) == (1e6, found["dtype"])


def test_older_keys_by_type_of_layer_and_within_a_part() -> None:
    """Gemma 3's: a base of its own for blocks with a window; of a model for images, in its text's configuration."""
    full, sliding = ROPES["linear"][0], {"rope_type": "default", "rope_theta": 1e4}
    text = {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}, "hidden_size": 8}
    expected = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": ROPES["linear"][1]}
    assert older_keys(text) == expected
    assert older_keys({"text_config": text, "vision_config": {"a": 1}}) == {"text_config": {**text, **expected}}
    assert older_keys({}) == {}
    newer = {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}}
    assert older_keys({"rope_parameters": newer}) == {"rope_theta": 1e6}  # version 5 would take it for all there is


@pytest.fixture
def own_head(tmp_path: Path) -> Path:
    """A model whose flag says tied, with a head of its own: of a full fine-tune, or a merge."""
    folder = tmp_path / "model"
    model = tiny_model("llama", vocab_size=259, tie_word_embeddings=False)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


@pytest.mark.parametrize("bits", [None, 8])
def test_the_flag_of_tied_embeddings_follows_the_tensors(own_head: Path, bits: int | None, tmp_path: Path) -> None:
    import upq

    artifact = artifact_of(tmp_path / "artifact", own_head, embeddings_bits=bits)
    head = load_file(own_head / "model.safetensors")["lm_head.weight"]
    found = upq.load(artifact, dequantize=True).lm_head.weight
    assert torch.equal(found, head) if bits is None else (found - head).abs().max() < 0.05
    assert not json.loads((artifact / "config.json").read_text())["tie_word_embeddings"]
    if bits is None:
        export(artifact, "dense", tmp_path / "dense")
        assert not json.loads((tmp_path / "dense" / "config.json").read_text())["tie_word_embeddings"]


def test_an_artefact_that_still_has_the_flag_is_exported_without_it(own_head: Path, tmp_path: Path) -> None:
    """As written before the flag followed the tensors."""
    from upq.artifact.manifest import file_entry, read_manifest, write_manifest

    artifact = artifact_of(tmp_path / "artifact", own_head)
    config = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    manifest = read_manifest(artifact)
    files = {**manifest.files, "config.json": file_entry(artifact / "config.json")}
    write_manifest(artifact, manifest.model_copy(update={"files": files}))
    export(artifact, "dense", tmp_path / "dense")
    assert not json.loads((tmp_path / "dense" / "config.json").read_text())["tie_word_embeddings"]


@pytest.fixture
def with_biases(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_model("qwen3", vocab_size=259, attention_bias=True).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: torch.randn_like(v) if "bias" in k else v for k, v in tensors.items()}, folder / "model.safetensors")
    return artifact_of(tmp_path / "artifact", folder)


def test_biases_without_a_place_in_an_engine_are_refused(with_biases: Path, tmp_path: Path) -> None:
    with pytest.raises(UPQError, match=r"llama\.cpp has no place for model\.layers\.0\.self_attn\.\w+\.bias"):
        export(with_biases, "gguf", tmp_path / "x.gguf")
    with pytest.raises(UPQError, match=r"mlx-lm has no place for model\.layers\.0\.self_attn\.\w+\.bias"):
        Mlx(MlxOptions()).plan(Source.open(with_biases))
    assert not (tmp_path / "x.gguf").exists()
    assert export(with_biases, "dense", tmp_path / "dense").exact
    notes = CompressedTensors(CompressedTensors.Config()).plan(Source.open(with_biases)).notes
    assert any("leave out model.layers.0.self_attn.o_proj.bias" in note for note in notes)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_biases_with_a_place_are_exported(family: str, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", family, **({"attention_bias": True} if family == "llama" else {}))
    export(artifact, "gguf", tmp_path / "x.gguf")
    Mlx(MlxOptions()).plan(Source.open(tiny_artifact(tmp_path / "a64", family, hidden_size=64, intermediate_size=128)))


@pytest.mark.parametrize(("bos", "expected"), [(None, 1), (0, 0), (7, 7)])
def test_a_first_token_that_is_null_is_a_number_for_genai(bos: int | None, expected: int, tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", bos_token_id=bos)
    ids = {k: v for k, v in _genai(Source.open(artifact))["model"].items() if k.endswith("token_id")}
    assert ids["bos_token_id"] == expected
    assert all(isinstance(value, int | list) for value in ids.values())
