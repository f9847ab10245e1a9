"""Artefacts in transformers: every family, tied and untied, loads to what was trained and saves to what was loaded.

Logits are compared bit for bit, so products run through the reference kernels.
"""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

import upq
from pairwise import pairwise
from tiny import FAMILIES
from upq.artifact import manifest as artifact
from upq.artifact.manifest import Manifest, SourceModel
from upq.artifact.transformers import UpqConfig, pack_model, quantize_rows, write_artifact
from upq.core.errors import UPQError
from upq.core.scheme import QTensor, QuantScheme
from upq.grids import GRIDS, search_scale
from upq.model.loading import generation_config, load_model
from upq.model.source import Source
from upq.nn.blocks import model_weights
from upq.nn.fake_quant import FakeQuantLinear
from upq.nn.packed import PackedEmbedding, PackedLinear, TiedHead

IDS = torch.arange(2, 22).view(2, 10)
MANIFEST = Manifest(model=SourceModel(path="org/tiny", digest="0"))
SEQ2 = QuantScheme(bits=2)


pytestmark = pytest.mark.usefixtures("reference")


def tiny(name: str = "llama", *, tied: bool = True, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = AutoConfig.for_model(
        name,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        vocab_size=67,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():  # biases and norms that are not all equal
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def fake_quantised(model: PreTrainedModel, schemes: dict[str, QuantScheme]) -> dict[str, QTensor]:
    """Swap in FakeQuantLinears on `schemes`; their frozen values."""
    for path, scheme in schemes.items():
        linear = model.get_submodule(path)
        params = search_scale(linear.weight, scheme)
        model.set_submodule(path, FakeQuantLinear(linear.weight, params, scheme, linear.bias))
    return {path: model.get_submodule(path).freeze() for path in schemes}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def saved(model: PreTrainedModel, out: Path) -> dict[str, bytes]:
    out.mkdir()
    model.save_pretrained(out)
    return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No warning by transformers or Python while the test runs."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    logger.removeHandler(caplog.handler)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


def write_tiny(out: Path, model: PreTrainedModel | None = None, **options: Any) -> Path:
    model = model or tiny()
    qtensors = fake_quantised(copy.deepcopy(model), dict.fromkeys(model_weights(model), SEQ2))
    out.mkdir(exist_ok=True)
    write_artifact(out, model, qtensors, manifest=MANIFEST, **options)
    return out


@pytest.mark.usefixtures("quiet")
@pairwise(family=FAMILIES, tied=[True, False], embeddings=[None, 4, 8])
def test_an_artefact_computes_what_was_trained(family: str, tied: bool, embeddings: Any, tmp_path: Path) -> None:
    source = tiny(family, tied=tied)
    trained = copy.deepcopy(source)
    qtensors = fake_quantised(trained, dict.fromkeys(model_weights(source), SEQ2))
    if embeddings:
        for table in {trained.get_input_embeddings(), *([] if tied else [trained.lm_head])}:
            table.weight.data = quantize_rows(table.weight, QuantScheme(bits=embeddings)).dequantize()
    expected = logits(trained)
    out = tmp_path / "out"
    out.mkdir()
    write_artifact(out, source, qtensors, manifest=MANIFEST, embeddings_bits=embeddings)
    assert torch.equal(logits(source), expected)  # packed in place

    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(model), expected)
    assert all(isinstance(model.get_submodule(path), PackedLinear) for path in model_weights(model))
    assert isinstance(model.get_input_embeddings(), PackedEmbedding) == bool(embeddings)
    generated = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 13)

    files = saved(model, tmp_path / "again")
    assert files == {name: (out / name).read_bytes() for name in files}
    assert {"model.safetensors", "config.json", "generation_config.json"} <= files.keys()
    assert torch.equal(logits(upq.load(tmp_path / "again")), expected)

    stored = load_file(out / "model.safetensors")
    tables = [name for name in stored if name.startswith(("lm_head", "model.embed")) and not name.endswith("scale")]
    assert len(tables) == (1 if tied else 2)

    dense = upq.load(out, dequantize=True)
    assert type(dense.get_submodule(next(iter(model_weights(dense))))) is nn.Linear
    assert not any(isinstance(m, PackedLinear | PackedEmbedding | TiedHead) for m in dense.modules())
    assert torch.equal(logits(dense), expected)
    assert (dense.lm_head.weight is dense.get_input_embeddings().weight) == tied
    saved(dense, tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert getattr(plain.config, "quantization_config", None) is None
    assert torch.equal(logits(plain), expected)


@pytest.mark.usefixtures("quiet")
@pairwise(
    family=FAMILIES,
    layout=["tied", "untied", "tied, but with a head of its own", "without settings"],
    embeddings=[None, 8],
)
def test_without_the_linears_the_artefact_is_the_same_bytes(
    family: str, layout: str, embeddings: Any, tmp_path: Path
) -> None:
    """What is packed is never loaded; everything else of the source is there: biases, norms, how it generates."""
    source = tiny(family, tied=layout == "tied", dtype=torch.bfloat16)
    source.generation_config.update(do_sample=True, temperature=0.7)
    source.save_pretrained(tmp_path / "source")
    if layout == "without settings":
        (tmp_path / "source" / "generation_config.json").unlink()
    if layout.startswith("tied, but"):
        file = tmp_path / "source" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    whole, bare = load_model(tmp_path / "source"), Source(tmp_path / "source", dtype="auto").without_matrices()
    bare.generation_config = generation_config(tmp_path / "source")
    paths = model_weights(whole)
    weights = {path: whole.get_submodule(path).weight.float() for path in paths}
    qtensors = {path: GRIDS.get("seq").freeze(w, search_scale(w, SEQ2), SEQ2) for path, w in weights.items()}
    assert all(bare.get_submodule(path).weight.is_meta for path in paths)
    for name, model in (("whole", whole), ("bare", bare)):
        (tmp_path / name).mkdir()
        write_artifact(tmp_path / name, model, qtensors, manifest=MANIFEST, embeddings_bits=embeddings)
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert files == {path.name for path in (tmp_path / "bare").iterdir()}
    assert "generation_config.json" in files
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "bare" / file).read_bytes(), file


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_scales(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny(family)
    out = write_tiny(tmp_path / "out", source, embeddings_bits=8)
    model = upq.load(out, dtype=dtype)
    assert model.dtype == dtype
    for name, tensor in model.state_dict().items():
        if name.endswith("weight_scale"):
            assert tensor.dtype == torch.float16
            assert torch.equal(tensor, source.state_dict()[name])
    dense = upq.load(out, dtype=dtype, dequantize=True)
    assert torch.equal(logits(dense), logits(model))
    assert {p.dtype for p in dense.parameters()} == {dtype}


@pytest.mark.usefixtures("quiet")
def test_a_saved_model_can_become_dense(tmp_path: Path) -> None:
    model = upq.load(write_tiny(tmp_path / "out"))
    expected = logits(model)
    saved(model, tmp_path / "again")
    model.dequantize()
    assert torch.equal(logits(model), expected)


@pytest.mark.usefixtures("quiet")
def test_bf16_source_equals_the_trained_model(tmp_path: Path) -> None:
    source = tiny("qwen2", dtype=torch.bfloat16)
    trained = copy.deepcopy(source)
    qtensors = fake_quantised(trained, dict.fromkeys(model_weights(source), SEQ2))
    write_artifact(tmp_path, source, qtensors, manifest=MANIFEST)
    model = upq.load(tmp_path)
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(trained))


@pytest.mark.usefixtures("quiet")
def test_mixed_schemes_and_linears_left_dense(tmp_path: Path) -> None:
    source = tiny()
    paths = list(model_weights(source))
    schemes = dict.fromkeys(paths, QuantScheme(bits=2, group_size=8, grid="affine"))
    schemes[paths[3]] = QuantScheme(bits=4)
    schemes[paths[6]] = QuantScheme(bits=3, scale_dtype="bfloat16")
    schemes = {path: s for path, s in schemes.items() if not path.endswith("down_proj") or path == paths[6]}
    trained = copy.deepcopy(source)
    qtensors = fake_quantised(trained, schemes)
    norm = torch.rand(32)
    trained.model.norm.weight.data.copy_(norm)
    extra = {"model.norm.weight": norm}
    manifest = write_artifact(
        tmp_path, source, qtensors, manifest=MANIFEST, extra_tensors=extra, errors={paths[0]: 0.5}
    )
    model = upq.load(tmp_path)
    assert type(model.get_submodule(paths[-1])) is nn.Linear
    assert torch.equal(logits(model), logits(trained))
    assert artifact.read_manifest(tmp_path) == manifest
    assert {layer.name: layer.bits for layer in manifest.layers} == {path: s.bits for path, s in schemes.items()}
    assert manifest.layers[0].error == 0.5
    assert manifest.layers[0].bits_per_weight == 2 + 2 * 16 / 8
    for name, entry in manifest.files.items():
        assert entry == artifact.file_entry(tmp_path / name)
    assert "import upq" in (tmp_path / "README.md").read_text()
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_a_damaged_artefact_is_an_error_that_names_it(tmp_path: Path) -> None:
    out = write_tiny(tmp_path / "out")
    weights = out / "model.safetensors"
    good = load_file(weights)
    path = "model.layers.1.mlp.up_proj.weight_scale"

    def refuses(tensors: dict[str, Tensor], message: str) -> None:
        save_file(tensors, weights, {"format": "pt"})
        with pytest.raises(UPQError, match=message) as caught:
            upq.load(out)
        assert "\n" not in str(caught.value)

    refuses({k: v for k, v in good.items() if k != path}, rf"model\.safetensors: tensor {path} is missing")
    refuses({k: v for k, v in good.items() if k != "model.norm.weight"}, r"tensor model\.norm\.weight is missing")
    refuses({k: v for k, v in good.items() if "embed" not in k}, r"tensor model\.embed_tokens\.weight is missing")
    refuses({**good, path: good[path][:-1].clone()}, "has shape")
    refuses({**good, "model.layers.7.x": torch.ones(1)}, r"model\.layers\.7\.x does not belong")
    save_file(good, weights, {"format": "pt"})
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UPQError, match=r"model\.safetensors: damaged or truncated"):
        upq.load(out)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 2, "newer than this upq"),
        ("surprise", 1, "unknown key 'surprise'"),
        ("linears", {"bits": 2, "zip": 1}, "quantization_config.linears: not a scheme"),
        ("linears", {"bits": 9}, "bits must be in 2..8"),
        ("overrides", {"model.layers.0.mlp.x": None}, "override 'model.layers.0.mlp.x' is no weight matrix"),
    ],
)
def test_a_wrong_config_is_an_error_that_names_the_key(key: str, value: Any, message: str, tmp_path: Path) -> None:
    out = write_tiny(tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"][key] = value
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UPQError, match=message):
        upq.load(out)


def test_only_causal_models_load(tmp_path: Path) -> None:
    out = write_tiny(tmp_path / "out")
    with pytest.raises(UPQError, match="class of its language model"):
        AutoModel.from_pretrained(out)


@pytest.mark.slow  # a Python without upq is a fresh one
def test_without_upq_loading_fails(tmp_path: Path) -> None:
    """transformers alone must not come back with a model of random linears."""
    plain, tables = write_tiny(tmp_path / "plain"), write_tiny(tmp_path / "tables", embeddings_bits=8)
    code = f"""
from transformers import AutoModelForCausalLM
for out in {str(plain)!r}, {str(tables)!r}:
    try:
        AutoModelForCausalLM.from_pretrained(out)
    except RuntimeError as error:
        print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("refused: You set `ignore_mismatched_sizes`") == 2


def test_packing_refuses_what_does_not_belong() -> None:
    model = tiny()
    path = next(iter(model_weights(model)))
    grid = GRIDS.get("seq")
    w = model.get_submodule(path).weight
    q = grid.freeze(w, grid.init(w, SEQ2), SEQ2)
    with pytest.raises(UPQError, match="lm_head is no weight matrix of a decoder block"):
        pack_model(model, {"lm_head": q})
    with pytest.raises(UPQError, match=r"extra tensor model\.norm\.bias"):
        pack_model(model, {path: q}, extra_tensors={"model.norm.bias": torch.ones(32)})
    with pytest.raises(UPQError, match="no quantised weight"):
        pack_model(model, {})


def test_the_memory_stays_packed(tmp_path: Path) -> None:
    out = write_tiny(tmp_path / "out", embeddings_bits=8)
    model = upq.load(out)
    packed = sum(t.nbytes for t in load_file(out / "model.safetensors").values()) - 1  # the guard byte
    assert sum(t.nbytes for t in model.state_dict().values()) == packed
    assert UpqConfig.from_dict(model.config.quantization_config.to_dict()).to_dict()["linears"]["bits"] == 2
