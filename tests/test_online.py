"""Rotations of linears' inputs while the model runs: the function stays, and the artefact restores them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import upq
from test_activations import TRAINING, codes, logits, run
from test_transforms import logits as logits_of
from test_transforms import transformed, uneven
from tiny import tiny_model
from upq.artifact.manifest import read_manifest
from upq.core.errors import UPQError
from upq.core.hadamard import factors, hadamard, randomised
from upq.core.scheme import QuantScheme
from upq.data.config import Data
from upq.distill.student import frozen, make_student
from upq.exports import export
from upq.grids import GRIDS
from upq.model.layout import block_list
from upq.model.loading import load_model
from upq.model.matrices import matrices
from upq.model.online import OnlineRotation, online, rotation_of
from upq.model.source import Source
from upq.nn.fake_quant import Solution
from upq.run.recipe import Recipe
from upq.stages.transform import Transformed
from zoo import random_model


@pytest.mark.parametrize("width", [2, 12, 16, 28, 48, 128, 576, 1536])
def test_two_factors_are_the_matrix(width: int) -> None:
    left_AA, right_BB = factors(width)
    assert torch.equal(torch.kron(left_AA.sign(), right_BB.sign()), hadamard(width).sign())
    assert torch.allclose(torch.kron(left_AA, right_BB), hadamard(width), atol=1e-12)
    x = torch.randn(3, 5, 2 * width, dtype=torch.float64)
    turn = torch.block_diag(randomised(width, 7), randomised(width, 7))
    assert torch.allclose(OnlineRotation(block=width, seed=7)(x), x @ turn, atol=1e-5)
    assert torch.allclose(
        OnlineRotation(block=width)(x), x @ torch.block_diag(hadamard(width), hadamard(width)), atol=1e-5
    )


CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {"sites": ["down"]}) for family in ("llama", "qwen2", "phi3", "gemma3_text", "granite")),
    ("llama", {"sites": ["residual", "value", "down"], "untie": True}),
    ("qwen3", {"sites": ["value", "inputs"], "block": 16}),
    ("gpt2", {"sites": ["inputs"], "block": 8}),
]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_the_function_stays(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = uneven(random_model(family))
    before, old = logits_of(model), {name: p.clone() for name, p in model.named_parameters()}
    new = load_model(transformed(model, tmp_path, **options))
    assert (logits_of(new) - before).abs().max() <= 1e-5 * before.abs().max()
    for path in online(new.config):
        assert rotation_of(new.get_submodule(path)) is not None
        assert not torch.allclose(new.get_parameter(f"{path}.weight"), old[f"{path}.weight"], atol=1e-4)
    blocks = len(block_list(new))
    assert len(online(new.config)) == blocks * (
        len(matrices(block_list(new)[0])) if "inputs" in options["sites"] else 1
    )


def test_students_turn_their_inputs(tmp_path: Path) -> None:
    teacher = load_model(transformed(random_model("llama"), tmp_path, sites=["down"]))
    scheme, grid = QuantScheme(bits=8, grid="affine"), GRIDS.get("affine")
    solutions = {
        f"model.layers.{i}.{m.name}": Solution(w := m.read(block), grid.init(w, scheme), scheme)
        for i, block in enumerate(block_list(teacher))
        for m in matrices(block)
    }
    student, expected = make_student(teacher, solutions, train_norms=False), logits_of(teacher)
    assert (logits_of(student) - expected).abs().max() < 0.03 * expected.abs().max()
    assert torch.allclose(logits_of(frozen(student)), logits_of(student), atol=1e-6)


def test_an_artefact_restores_them_and_exports_refuse(tmp_path: Path) -> None:
    stages = {
        "turn": {"stage": "transform", "method": {"name": "rotate", "sites": ["value", "down"]}},
        "codes": codes(bits=8, activations={"bits": 8}),
        "distill": {**TRAINING, "lr": 1e-6, "scale_lr": 1e-6},
    }
    path = run(tmp_path, "out", stages)
    manifest = read_manifest(path)
    assert manifest.metrics["artifact"]["kld"] < 1e-3
    assert manifest.transforms[0].endswith("but for the input of down, turned while the model runs")
    assert list(json.loads((path / "config.json").read_text())["upq_online"]) == [
        f"model.layers.{i}.mlp.down_proj" for i in range(2)
    ]
    gap = (logits(path, "w2a8") - logits(path, "reference")).abs().max()
    assert gap < 1e-4 * logits(path, "reference").abs().max()
    model, ids = upq.load(path), torch.tensor([[5, 6, 7]])
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert model.why_not_compiled == "model.layers.0.mlp.down_proj has a hook"
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again", "reference"), logits(path, "reference"))
    with torch.no_grad():
        dense = upq.load(path, dequantize=True)(torch.tensor([[5, 6, 7]])).logits
        assert torch.allclose(dense, logits_on(path, ids), atol=1e-5)
    with pytest.raises(UPQError, match=r"dense has no place for the rotation of a linear's input \(model.layers.0"):
        export(path, "dense", tmp_path / "dense")


def logits_on(path: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), upq.kernels.computing("reference"):
        found: torch.Tensor = upq.load(path)(ids).logits
    return found


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("llama", {"sites": ["down", "inputs"]}, "`inputs` turns the input of down too"),
        ("llama", {"sites": ["inputs"], "block": 128}, "has 32 inputs, no multiple of 128"),
        ("mixtral", {"sites": ["inputs"], "block": 16}, "holds experts, whose inputs are not turned yet"),
        ("mixtral", {"sites": ["down"]}, "no linear beside attention writes the stream"),
    ],
)
def test_what_it_does_not_know_is_refused(family: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    random_model(family).save_pretrained(tmp_path)
    with pytest.raises(UPQError, match=said):
        Transformed(method={"name": "rotate", **options}).check("turn", Source(tmp_path), Data())


def test_heavy_tails_lose_less_on_mxfp4_and_more_on_nvfp4() -> None:
    """MR-GPTQ's thesis (2509.23202), in squared errors of Student's t with 4 degrees."""
    torch.manual_seed(0)
    w_OI = torch.distributions.StudentT(4.0).sample(torch.Size((64, 4096)))
    turned_OI = OnlineRotation(block=128)(w_OI)

    def error(w_OI: torch.Tensor, grid: str, group: int, scales: str) -> float:
        scheme = QuantScheme(bits=4, grid=grid, group_size=group, scale_dtype=scales)
        found = GRIDS.get(grid)
        lost = found.fake(w_OI, found.init(w_OI, scheme), scheme) - w_OI
        return float(lost.square().sum() / w_OI.square().sum())

    assert error(turned_OI, "mxfp4", 32, "e8m0") < 0.8 * error(w_OI, "mxfp4", 32, "e8m0")
    assert error(turned_OI, "nvfp4", 16, "e4m3") > 1.02 * error(w_OI, "nvfp4", 16, "e4m3")


CHOOSE = {"sites": ["residual", "value", "down"], "untie": True, "choose": {"bits": 4}}


def outlying(model: Any) -> Any:
    """The first block's down reads one channel that is much larger: most others are rounded to zero either way."""
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight.data[3] *= 100
    mlp.down_proj.weight.data[:, 3] /= 100
    return model


def test_what_loses_less_is_turned(tmp_path: Path) -> None:
    model = outlying(uneven(tiny_model("llama", intermediate_size=48)))
    before = logits_of(model)
    path = transformed(model, tmp_path, **CHOOSE)
    choice = json.loads((path / "choice.json").read_text())
    for site in ("value", "down"):
        errors = choice["errors"][site]
        assert choice["blocks"][site] == [i for i, (plain, turned) in enumerate(errors) if turned < plain]
    plain, turned = (sum(each) for each in zip(*choice["errors"]["residual"], strict=True))
    assert choice["blocks"]["residual"] == ([0, 1] if turned < plain else [])
    assert len(choice["blocks"]["down"]) == 1  # of two blocks
    new = load_model(path)
    assert list(online(new.config)) == [f"model.layers.{i}.mlp.down_proj" for i in choice["blocks"]["down"]]
    assert (logits_of(new) - before).abs().max() <= 1e-5 * before.abs().max()


def test_errors_are_those_of_their_definition(tmp_path: Path) -> None:
    """Of `down` in the first block, in float64 from hidden states that transformers computes."""
    model = outlying(tiny_model("llama", intermediate_size=48))
    path = transformed(model, tmp_path, **CHOOSE)
    seen = list[torch.Tensor]()
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda _module, args: seen.append(args[0].double()))
    logits_of(model)
    turn = randomised(48, 0)

    def lost(x: torch.Tensor) -> float:
        low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
        scale = (high - low) / 15
        zero = (-low / scale).round()
        return float((((x / scale).round() + zero).clamp(0, 15).sub(zero).mul(scale) - x).square().sum())

    def weights(w: torch.Tensor) -> float:
        scheme, grid = QuantScheme(bits=4, grid="affine"), GRIDS.get("affine")
        w = w.float()
        return float((grid.fake(w, grid.init(w, scheme), scheme) - w).double().square().sum())

    w = down.weight.detach().double()
    expected = [lost(x) / 2 + weights(v) for x, v in ((seen[0], w), (seen[0] @ turn, w @ turn))]
    assert json.loads((path / "choice.json").read_text())["errors"]["down"][0] == pytest.approx(expected, rel=1e-3)


def test_the_recipe_of_roste_runs(tmp_path: Path) -> None:
    settings = [
        "data.seq_len=32",
        "data.validation=8",
        "turn.samples=8",
        "int4.samples=8",
        "distill.tokens=256",
        "distill.micro_batch_size=2",
    ]
    stages = {name: stage.settings() for name, stage in Recipe.load("roste", settings).stages.items()}
    path = run(tmp_path, "out", stages)
    config = json.loads((path / "config.json").read_text())
    assert config["quantization_config"]["activations"] == config["quantization_config"]["kv"]
    assert read_manifest(path).metrics["artifact"]["kld"] >= 0
    assert read_manifest(path).transforms


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"model.layers.9.mlp.down_proj": {"block": 16}}, "model.layers.9.mlp.down_proj: is no linear"),
        ({"model.layers.0.mlp.down_proj": {"block": 32}}, "has 48 inputs, no multiple of block=32"),
        ({"model.layers.0.mlp.down_proj": {"block": -16}}, "no multiple of block=-16"),
        ({"model.layers.0.mlp.down_proj": {"block": 6}}, "no Hadamard matrix of width 6"),
        ({"model.layers.0.mlp.down_proj": {"block": 16, "blocks": 6}}, "unknown key"),
        ([1], "expected rotations by module path"),
    ],
)
def test_a_foreign_configuration_is_refused(raw: Any, said: str, tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"upq_online": raw}))
    for read in (load_model, Source):
        with pytest.raises(UPQError, match=said):
            read(tmp_path)
