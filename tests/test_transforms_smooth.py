"""Smoothing leaves the function, and puts large channels into the weights that read them, by three rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upq
from test_transforms import FAMILIES, IDS, logits, uneven
from tiny import byte_tokenizer, tiny_model
from upq.artifact.manifest import read_manifest
from upq.core.errors import UPQError
from upq.core.outliers import threshold
from upq.core.progress import Silent
from upq.data.config import Data
from upq.model.loading import load_model
from upq.model.source import Source
from upq.run.recipe import Recipe
from upq.run.run import quantize
from upq.stages.transform import Transformed
from upq.transforms import TRANSFORMS, write_transformed
from zoo import random_model


def smoothed(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder / "model")
    cls = TRANSFORMS.get("smooth")
    transform = cls(cls.Config(**options))
    write_transformed(Source(folder / "model"), transform, folder / "new", Silent(), rows_NT=IDS)
    return folder / "new"


def loud(model: Any) -> Any:
    """With norms and values of which a few channels are much larger than the others."""
    for name, parameter in uneven(model).named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.data[::11] *= 20
        if name.endswith("up_proj.weight"):
            parameter.data[::7] *= 20
    return model


RULES = ["percentile", "smoothquant", "awq", "cfp"]
# Gemma's norms add one to their weight; two of four stand behind a linear.
CASES = [*((family, "smoothquant") for family in (*FAMILIES, "gemma3_text")), ("llama", "awq"), ("qwen3_moe", "awq")]


@pytest.mark.parametrize(
    ("family", "rule"), [*CASES, ("llama", "percentile"), ("mixtral", "percentile"), ("qwen3_moe", "cfp")]
)
def test_smoothing_leaves_the_function(family: str, rule: str, tmp_path: Path) -> None:
    model = loud(random_model(family))
    before, old = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    new = load_model(smoothed(model, tmp_path, rule=rule))
    assert (logits(new) - before).abs().max() <= 1e-5 * before.abs().max()
    changed = {name for name, p in new.named_parameters() if not torch.equal(p, old[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} >= {"input_layernorm"}


def inputs(model: Any, path: str) -> Tensor:
    found = list[Tensor]()
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: found.append(args[0].detach()))
    logits(model)
    handle.remove()
    return found[0].flatten(0, 1).double()


GATE, DOWN = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("rule", RULES)
def test_factors_follow_their_rule(rule: str, tmp_path: Path) -> None:
    """Channel by channel, in the first block, whose inputs no factor of an earlier one has rounded."""
    model = loud(tiny_model("llama"))
    mlp: Any = model.model.layers[0].mlp
    weights = {GATE: [mlp.gate_proj.weight, mlp.up_proj.weight], DOWN: [mlp.down_proj.weight]}
    before = {path: inputs(model, path) for path in weights}
    old = {path: [w.detach().double().clone() for w in each] for path, each in weights.items()}
    new = load_model(smoothed(model, tmp_path, rule=rule, sites=["norm"], alpha=0.7))
    factor_I = (before[GATE] / inputs(new, GATE)).median(0).values
    peak_I = before[GATE].abs().amax(0)
    if rule == "percentile":
        channels = len(peak_I)
        baseline = peak_I.sort(descending=True).values[int(0.005 * channels + 1.5)]
        expected_I = (peak_I / baseline).clamp_min(1)
    elif rule == "cfp":  # tests/test_windows.py compares the threshold with a search
        limit = threshold(peak_I)
        assert limit is not None
        expected_I = (peak_I / limit).clamp_min(1).sqrt()
        assert expected_I.max() > 1
    elif rule == "smoothquant":
        expected_I = peak_I**0.7 / torch.cat(old[GATE]).abs().amax(0) ** 0.3
    else:
        mean_I = before[GATE].abs().mean(0)
        powers = torch.arange(20).double() / 20
        candidates = [mean_I**power / (mean_I.max() ** power * mean_I.min() ** power).sqrt() for power in powers]
        best = min(candidates, key=lambda factor_I: lost(before[GATE], old[GATE], factor_I))
        expected_I = best
    assert torch.allclose(factor_I, expected_I, rtol=1e-4)


def lost(x_TI: Tensor, weights: list[Tensor], factor_I: Tensor) -> float:
    """Squared error of the outputs at 4 bits, each row's range in 16 steps; in float64."""
    total = 0.0
    for w_OI in weights:
        times = w_OI * factor_I
        low, high = times.amin(1, keepdim=True).clamp_max(0), times.amax(1, keepdim=True).clamp_min(0)
        scale = ((high - low) / 15).half().double()
        zero = (-low / scale).round()
        rounded = ((times / scale + zero).round().clamp(0, 15) - zero) * scale / factor_I
        total += float((x_TI @ (rounded - w_OI).T).square().sum())
    return total


def test_activations_lose_less(tmp_path: Path) -> None:
    """What it is for: int8 a token of the inputs, whose other channels a large one leaves few levels."""

    def error(model: Any, path: str) -> float:
        x_TI, layer = inputs(model, path), model.get_submodule(path)
        scale_T1 = x_TI.abs().amax(1, keepdim=True) / 127
        lost_TI = ((x_TI / scale_T1).round() * scale_T1 - x_TI) @ layer.weight.detach().double().T
        return float(lost_TI.square().sum())

    model = uneven(tiny_model("llama"))
    first: Any = model.model.layers[0]
    first.post_attention_layernorm.weight.data[5] *= 30
    first.mlp.up_proj.weight.data[3] *= 30
    before = {path: error(model, path) for path in (GATE, DOWN)}
    new = load_model(smoothed(model, tmp_path, rule="percentile"))
    assert error(new, GATE) < 0.5 * before[GATE]
    assert error(new, DOWN) < 0.5 * before[DOWN]


def test_what_it_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UPQError, match="smooth does not know GPT2Block: in block 0 no RMS norm and no linear"):
        smoothed(random_model("gpt2"), tmp_path, sites=["norm"])
    method = {"name": "smooth", "rule": "awq", "group_size": 24}
    with pytest.raises(UPQError, match="in_features 32 is not a multiple of group_size 24"):
        Transformed(method=method).check("even", Source(smoothed(random_model("llama"), tmp_path / "llama")), Data())


def test_stopped_and_begun_again(tmp_path: Path) -> None:
    model = loud(tiny_model("llama"))
    whole, part = smoothed(model, tmp_path / "whole"), smoothed(model, tmp_path / "part")
    (part / "block-0001.safetensors").unlink()
    assert smoothed(model, tmp_path / "part") == part
    assert {f.name: f.read_bytes() for f in part.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}


def test_a_run(tmp_path: Path) -> None:
    """At 8 bits: the original's function, and a line of the manifest."""
    model = uneven(tiny_model("llama", vocab_size=300, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer(bos="<s>", eos="</s>").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Story {i} of {i * 7} geese and a fox." for i in range(200)))
    stages = {
        "even": {"stage": "transform", "method": {"name": "smooth", "rule": "percentile"}, "samples": 8},
        "codes": {"stage": "blockwise", "bits": 8, "method": "rtn"},
    }
    data = {
        "seq_len": 32,
        "validation": 8,
        "sources": [{"path": str(tmp_path / "text.txt"), "separator": "blank_line"}],
    }
    quantize(tmp_path / "model", Recipe.of({"data": data, "stages": stages}, "here"), tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.metrics["artifact"]["kld"] < 1e-4
    assert manifest.transforms == ["even: smooth rule=percentile, folded into the weights"]
    norm = upq.load(tmp_path / "out").get_submodule("model.layers.0.input_layernorm")
    assert isinstance(norm, nn.Module)
    assert not torch.equal(norm.weight, model.model.layers[0].input_layernorm.weight)
