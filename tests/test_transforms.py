"""Transforms change weights and leave the function: laws over the registry, and what each is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import upq
from tiny import byte_tokenizer, tiny_model
from upq.artifact.manifest import read_manifest
from upq.core.errors import UPQError
from upq.core.hadamard import hadamard, orthogonal, randomised
from upq.core.progress import Silent
from upq.core.scheme import QuantScheme
from upq.data.config import Data
from upq.grids import GRIDS, search_scale
from upq.model.loading import load_model
from upq.model.source import Source
from upq.run.recipe import Recipe
from upq.run.run import quantize
from upq.stages.transform import Transformed
from upq.transforms import TRANSFORMS, write_transformed
from zoo import random_model

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
UNTIED: dict[str, Any] = {"untie": True}


def transformed(model: Any, folder: Path, name: str = "rotate", **options: Any) -> Path:
    model.save_pretrained(folder / "model")
    cls = TRANSFORMS.get(name)
    write_transformed(Source(folder / "model"), cls(cls.Config(**options)), folder / "new", Silent(), rows_NT=IDS)
    return folder / "new"


def uneven(model: Any) -> Any:
    """With norms whose weights differ."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


OPTIONS = {"rotate": UNTIED}  # that a transform needs, by its name


@pytest.mark.parametrize("name", TRANSFORMS.names())
def test_logits_stay(name: str, tmp_path: Path) -> None:
    model = uneven(random_model("llama"))
    before = logits(model)
    new = load_model(transformed(model, tmp_path, name, **OPTIONS.get(name, {})))
    assert (logits(new) - before).abs().max() <= 1e-5 * before.abs().max()


# Biases of values, norms of heads, tied and own heads, experts in one tensor and their routers, scaled residuals.
FAMILIES = ("llama", "qwen2", "qwen3", "smollm3", "granite", "mistral", "qwen3_moe", "mixtral", "phi3", "olmoe")


CHOICES: list[dict[str, Any]] = [{"matrix": "orthogonal"}, {"sites": ["residual"]}]


@pytest.mark.parametrize(
    ("family", "options"), [*((name, {}) for name in FAMILIES), *(("qwen3_moe", each) for each in CHOICES)]
)
def test_a_rotation_leaves_the_function(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = uneven(random_model(family))
    path = transformed(model, tmp_path, **{**UNTIED, **options})
    new, before = load_model(path), logits(model)
    assert (logits(new) - before).abs().max() <= 1e-5 * before.abs().max()
    assert all(p.eq(1).all() for name, p in new.named_parameters() if name.endswith("_layernorm.weight"))


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("gemma3_text", UNTIED, "rotate does not know Gemma3DecoderLayer: with its residual stream rotated, block 0"),
        ("gpt2", UNTIED, "has no RMS norm at its end"),
        ("llama", {"sites": ["residual"]}, "million weights of its own; set turn.method.untie=true"),
    ],
)
def test_what_it_does_not_know_is_refused(family: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = uneven(random_model(family, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "model")

    def run() -> None:
        Transformed(method={"name": "rotate", **options}).check("turn", Source(tmp_path / "model"), Data())
        transformed(model, tmp_path, **options)

    with pytest.raises(UPQError, match=said):
        run()


def test_a_tied_head_keeps_its_weights_where_values_alone_are_turned(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    new = load_model(transformed(model, tmp_path, sites=["value"]))
    assert new.lm_head.weight is new.model.embed_tokens.weight
    assert torch.equal(new.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(new.model.layers[1].self_attn.v_proj.weight, model.model.layers[1].self_attn.v_proj.weight)
    assert (logits(new) - logits(model)).abs().max() <= 1e-5 * logits(model).abs().max()


def test_stopped_and_begun_again(tmp_path: Path) -> None:
    model = tiny_model("llama")
    whole = transformed(model, tmp_path / "whole", **UNTIED)
    part = transformed(model, tmp_path / "part", **UNTIED)
    for file in ("block-0001.safetensors", "beside.safetensors", "model.safetensors.index.json"):
        (part / file).unlink()
    assert transformed(model, tmp_path / "part", **UNTIED) == part
    assert {f.name: f.read_bytes() for f in part.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_of_a_tied_model(dtype: torch.dtype, tmp_path: Path) -> None:
    """At 8 bits with a training after it: the original's function in its own type, from a head of its own."""
    model = tiny_model("llama", vocab_size=300, tie_word_embeddings=True).to(dtype)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer(bos="<s>", eos="</s>").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Story {i} of {i * 7} geese and a fox." for i in range(200)))
    source = {"path": str(tmp_path / "text.txt"), "separator": "blank_line"}
    training = {"tokens": 256, "loss": "gjs", "lr": 1e-5, "scale_lr": 1e-5, "batch_size": 4, "micro_batch_size": 2}
    stages = {
        "turn": {"stage": "transform", "method": {"name": "rotate", "untie": True}},
        "codes": {"stage": "blockwise", "bits": 8, "method": "rtn"},
        "distill": {**training, "hidden": 1.0},
    }
    data = {"seq_len": 32, "validation": 8, "sources": [source]}
    quantize(tmp_path / "model", Recipe.of({"data": data, "stages": stages}, "here"), tmp_path / "out")
    found = upq.load(tmp_path / "out")
    assert read_manifest(tmp_path / "out").metrics["artifact"]["kld"] < 1e-4
    assert found.dtype == dtype
    assert found.lm_head.weight is not found.model.embed_tokens.weight


@pytest.mark.parametrize("width", [1, 2, 12, 20, 24, 28, 32, 36, 44, 76, 576, 640, 896, 960])
def test_hadamard_matrices(width: int) -> None:
    for turn in (hadamard(width), randomised(width, 0)):
        assert torch.allclose(turn @ turn.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(turn.abs(), torch.full_like(turn, width**-0.5), atol=1e-12)
    assert torch.allclose(orthogonal(5, 0) @ orthogonal(5, 0).T, torch.eye(5, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("width", [3, 6, 92, 106])
def test_a_width_without_a_hadamard_matrix(width: int) -> None:
    with pytest.raises(UPQError, match=f"of width {width} is known here; use matrix=orthogonal"):
        hadamard(width)


def test_a_few_large_weights_become_many_small_ones(tmp_path: Path) -> None:
    """What it is for: a linear with an outlier channel loses less on a grid after the rotation."""
    model = tiny_model("llama", hidden_size=64, head_dim=16)
    model.model.layers[0].mlp.gate_proj.weight.data[:, 5] *= 30
    new, scheme = load_model(transformed(model, tmp_path, **UNTIED)), QuantScheme(bits=2)

    def error(of: Any) -> float:
        w = of.model.layers[0].mlp.gate_proj.weight.detach()
        w = w * of.model.layers[0].post_attention_layernorm.weight.detach()
        grid = GRIDS.get(scheme.grid)
        return float((grid.fake(w, search_scale(w, scheme), scheme) - w).square().sum() / w.square().sum())

    assert error(new) < 0.5 * error(model)
