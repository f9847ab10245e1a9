"""Rounded activations, keys and values: laws of the quantisers, and one function in stages, training and artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upq
from tiny import byte_tokenizer, tiny_model
from upq import kernels
from upq.artifact.manifest import read_manifest
from upq.artifact.transformers import UpqConfig
from upq.core.act_scheme import ActScheme
from upq.core.errors import UPQError
from upq.core.levels import E2M1, Uniform
from upq.core.scheme import QTensor, QuantScheme
from upq.data.config import Data
from upq.distill.student import frozen, make_student, round_activations
from upq.grids import GRIDS, scheme_of, search_scale
from upq.model.layout import block_list
from upq.model.matrices import matrices
from upq.model.source import Source
from upq.nn.activations import ActQuantiser, attach_inputs, static_scales
from upq.nn.fake_quant import Solution
from upq.nn.kv import attach_kv
from upq.nn.packed import PackedLinear
from upq.run.recipe import Recipe
from upq.run.run import quantize
from upq.stages.blockwise import Blockwise
from zoo import random_model

SCHEMES = [
    ActScheme(),
    ActScheme(bits=4),
    ActScheme(bits=4, per="group", group_size=16),
    ActScheme(per="tensor"),
    ActScheme(per="tensor", static=True),
    ActScheme(bits=4, kind="fp4", per="group", group_size=32, scale_dtype="e8m0"),
    ActScheme(bits=4, kind="fp4"),
    ActScheme(kind="fp8"),
]
ROUNDED_UP = [ActScheme(bits=4, symmetric=False), ActScheme(bits=4, clip=0.9)]  # whose range is another afterwards
IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def quantiser(scheme: ActScheme) -> ActQuantiser:
    return ActQuantiser(scheme, 0.02 if scheme.static else None)


def values(*shape: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 2, shape[0])[:, None]
    x[0] = 0
    return x


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rounding_twice_is_rounding_once(scheme: ActScheme) -> None:
    once = quantiser(scheme)(values(400, 64))
    assert torch.equal(quantiser(scheme)(once), once)
    assert not once[0].any()
    assert not torch.equal(once, values(400, 64))


@pytest.mark.parametrize("scheme", [*SCHEMES, *ROUNDED_UP], ids=str)
def test_gradients_pass_straight_through(scheme: ActScheme) -> None:
    x, grad = values(9, 64).requires_grad_(), torch.randn(9, 64)
    quantiser(scheme)(x).backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("scheme", [s for s in [*SCHEMES, *ROUNDED_UP] if s.per != "tensor" or s.static], ids=str)
def test_a_token_does_not_depend_on_the_others(scheme: ActScheme) -> None:
    x = values(9, 64)
    whole = quantiser(scheme)(x)
    assert all(torch.equal(quantiser(scheme)(x[i : i + 1])[0], whole[i]) for i in range(9))


def levels(scheme: ActScheme) -> list[float]:
    if scheme.kind == "fp4":
        return sorted(set(E2M1))
    if scheme.kind == "fp8":
        every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
        return sorted({float(v) for v in every if v.isfinite()})
    most = 2 ** (scheme.bits - 1) - 1
    return [float(v) for v in range(-most, most + 1)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_value_becomes_the_nearest_of_its_levels(scheme: ActScheme) -> None:
    """Against a search over every level, in float64."""
    x = values(20, 64)
    groups = x.unflatten(-1, (-1, scheme.group_size)) if scheme.group_size else x
    known = torch.tensor(levels(scheme), dtype=torch.float64)
    if scheme.static:
        scale = torch.tensor(0.02)
    else:
        peak = groups.abs().amax() if scheme.per == "tensor" else groups.abs().amax(-1, keepdim=True)
        scale = peak / known.max().float()
        scale = scale.log2().ceil().exp2() if scheme.scale_dtype == "e8m0" else scale
    error = (groups.double()[..., None] - known * scale.double()[..., None]).abs().amin(-1).view(x.shape)
    found = (quantiser(scheme)(x).double() - x.double()).abs()
    assert (found <= error + 1e-6 * x.double().abs() + 1e-12).all()


def test_a_zero_point_holds_a_range_of_one_sign() -> None:
    x = torch.rand(5, 64, generator=torch.Generator().manual_seed(0)) + 0.1
    step = x.amax(-1, keepdim=True) / 15
    assert ((ActQuantiser(ActScheme(bits=4, symmetric=False))(x) - x).abs() <= 0.51 * step).all()


def test_int8_a_token_is_what_the_kernel_does() -> None:
    """Bit for bit: a weight of ones on its diagonal shows the kernel's own integers and scales."""
    size = 64
    scale_OG, zero_OG = torch.ones(size, 1, dtype=torch.float16), torch.zeros(size, 1)
    scheme = QuantScheme(bits=2, grid="affine")
    q = QTensor(torch.eye(size, dtype=torch.uint8), scale_OG, Uniform(zero_OG), scheme)
    assert torch.equal(q.dequantize(), torch.eye(size))
    layer, x = PackedLinear.from_qtensor(q), values(40, size)
    with kernels.computing("w2a8"):
        plain = layer(x)
    layer.input = ActQuantiser(ActScheme())
    for compute in kernels.COMPUTES:
        with kernels.computing(compute):
            assert torch.equal(layer(x), plain)
    assert torch.equal(plain, ActQuantiser(ActScheme())(x))
    layer.input = ActQuantiser(ActScheme(bits=4))
    with kernels.computing("w2a8"):  # which would round the four bits once more
        assert torch.equal(layer(x), ActQuantiser(ActScheme(bits=4))(x))


@pytest.mark.parametrize("grid", ["fp6", "r2q"])
def test_levels_without_a_kernel_have_their_inputs_rounded(grid: str) -> None:
    """The reference computes them, whatever is chosen."""
    scheme, w_OI, x = scheme_of(bits=6 if grid == "fp6" else 2, grid=grid, group_size=-1), values(32, 64), values(5, 64)
    q = GRIDS.get(grid).freeze(w_OI, search_scale(w_OI, scheme), scheme)
    layer = PackedLinear.from_qtensor(q)
    layer.input = ActQuantiser(ActScheme())
    expected = torch.nn.functional.linear(layer.input(x), q.dequantize())
    for compute in kernels.COMPUTES:
        with kernels.computing(compute):
            assert torch.allclose(layer(x), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 4, "kind": "fp8"}, "kind=fp8 has 8 bits"),
        ({"per": "group"}, "group_size belongs to per=group"),
        ({"bits": 4, "kind": "fp4", "symmetric": False}, "has no zero point"),
        ({"static": True}, "static needs per=tensor"),
    ],
)
def test_schemes_that_are_none(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ActScheme(**options)


def check(family: str, folder: Path, **options: Any) -> None:
    random_model(family).save_pretrained(folder)
    Blockwise(bits=4, method="rtn", **options).check("int4", Source(folder), Data())


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("mixtral", {"activations": {}}, r"int4\.activations: inputs of experts \(mlp.experts.gate_up_proj\) are not"),
        ("llama", {"activations": {"per": "group", "group_size": 24}}, "has 32 inputs, no multiple of group_size=24"),
        ("llama", {"kv": {"per": "tensor"}}, "set per=token or per=group"),
        ("mamba", {"kv": {}}, r"int4\.kv: MambaBlock does not call transformers' attention interface"),
        ("llama", {"activations": {"per": "tensor", "static": True}, "inputs": "original"}, "static scales need"),
    ],
)
def test_what_cannot_be_rounded_is_refused(family: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UPQError, match=said):
        check(family, tmp_path, **options)


def test_without_them_nothing_changes() -> None:
    assert not {"activations", "kv"} & Blockwise(bits=4, method="rtn").settings().keys()
    assert not {"activations", "kv", "input_scales"} & UpqConfig(linears=QuantScheme(bits=2)).to_dict().keys()


def test_methods_see_rounded_inputs() -> None:
    """So GPTQ's second moments are of them."""
    block, scheme = tiny_model("llama").model.layers[0], ActScheme(bits=2)
    seen = list[Tensor]()
    attach_inputs(block, ["mlp.up_proj"], scheme, {})
    block.mlp.up_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    x = torch.randn(3, 32)
    block.mlp(x)
    assert torch.equal(seen[0], ActQuantiser(scheme)(x))
    assert seen[0].unique(dim=-1).shape != x.shape or not torch.equal(seen[0], x)


def test_static_scales_are_the_range_of_the_calibration() -> None:
    linear, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(5, 8)
    found = static_scales(linear, ["0"], ActScheme(per="tensor", static=True, clip=0.5), lambda: linear(x))
    assert found["0"] == pytest.approx(float(x.abs().max()) * 0.5 / 127)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3", "granite"])
def test_keys_and_values_are_rounded_behind_the_positions(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, calls = random_model(family).eval(), list[tuple[Tensor, Tensor]]()
    name = model.config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS[name]

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((key, value))
        return attend(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, spy)
    with torch.no_grad():
        before = model(IDS).logits
        plain, scheme = calls[0], ActScheme(bits=4)
        for block in block_list(model):
            attach_kv(block, scheme)
        calls.clear()
        after = model(IDS).logits
        assert len(calls) == len(block_list(model))
        assert all(torch.equal(got, ActQuantiser(scheme)(x)) for got, x in zip(calls[0], plain, strict=True))
        assert not torch.equal(before, after)
        # With a cache, token by token: the same numbers, rounded again at each reading.
        cache = model(IDS[:, :7], use_cache=True).past_key_values
        steps = [model(IDS[:, i : i + 1], past_key_values=cache, use_cache=True).logits[:, 0] for i in range(7, 12)]
    assert (torch.stack(steps, 1) - after[:, 7:]).abs().max() <= 1e-4 * after.abs().max()


def student_of(model: Any, scheme: QuantScheme) -> Any:
    solutions = {
        f"model.layers.{i}.{m.name}": Solution(w := m.read(block), search_scale(w, scheme), scheme)
        for i, block in enumerate(block_list(model))
        for m in matrices(block)
    }
    return make_student(model, solutions, train_norms=False)


@pytest.mark.parametrize("activations", [ActScheme(bits=4), ActScheme(per="tensor", static=True)], ids=str)
def test_a_frozen_student_is_the_student(activations: ActScheme) -> None:
    model = tiny_model("llama").eval()
    student = student_of(model, QuantScheme(bits=4))
    names = [m.name for m in matrices(block_list(model)[0])]
    with torch.no_grad():
        before = student(IDS).logits
        scales = dict.fromkeys(names, 0.03) if activations.static else {}
        round_activations(student, activations, ActScheme(bits=4), lambda _index: scales)
        after = student(IDS).logits
        assert not torch.equal(before, after)
        assert torch.allclose(frozen(student)(IDS).logits, after, atol=1e-6)


def run(folder: Path, name: str, stages: dict[str, Any]) -> Path:
    if not (folder / "model").is_dir():
        tiny_model("llama", vocab_size=300, intermediate_size=48).save_pretrained(folder / "model")
        byte_tokenizer(bos="<s>", eos="</s>").save_pretrained(folder / "model")
        (folder / "text.txt").write_text("\n\n".join(f"Story {i} of {i * 7} geese and a fox." for i in range(200)))
    data = {"seq_len": 32, "validation": 8, "sources": [{"path": str(folder / "text.txt"), "separator": "blank_line"}]}
    quantize(folder / "model", Recipe.of({"data": data, "stages": stages}, "here"), folder / name)
    return folder / name


TRAINING = {"tokens": 256, "loss": "gjs", "lr": 1e-4, "scale_lr": 1e-4, "batch_size": 4, "micro_batch_size": 2}


def codes(**options: Any) -> dict[str, Any]:
    return {"stage": "blockwise", "bits": 4, "samples": 8, "method": "gptq", **options}


def logits(path: Path, compute: str) -> Tensor:
    model = upq.load(path)
    with torch.no_grad(), kernels.computing(compute):
        found: Tensor = model(IDS).logits
    return found


def test_a_run_with_int8_inputs_is_computed_as_it_was_trained(tmp_path: Path) -> None:
    """Its kernel's logits are the reference's; those of a run without differ by what int8 loses."""
    plain = run(tmp_path, "plain", {"codes": codes(), "distill": TRAINING})
    rounded = run(tmp_path, "rounded", {"codes": codes(activations={}), "distill": TRAINING})

    def gap(path: Path, other: str) -> float:
        one, two = logits(path, "w2a8"), logits(path, other)
        return float((one - two).abs().max() / two.abs().max())

    assert gap(rounded, "reference") < 1e-2 * gap(plain, "reference")
    assert gap(rounded, "w2a16") < 1e-2 * gap(plain, "w2a16")
    assert gap(plain, "reference") > 1e-4
    model = upq.load(rounded)
    with kernels.computing("w2a8"):
        model.generate(IDS[:1], max_new_tokens=3, do_sample=False)
        assert model.why_not_compiled is None
    with kernels.computing("w2a16"):
        model.generate(IDS[:1], max_new_tokens=3, do_sample=False)
        assert model.why_not_compiled == "its activations are int8 per token, computed by w2a16"


@pytest.mark.parametrize(
    "options",
    [
        {"activations": {"bits": 4}, "kv": {"bits": 4}},
        {"activations": {"per": "tensor", "static": True}},
    ],
    ids=["W4A4KV4", "static"],
)
def test_the_artefact_restores_what_the_run_measured(options: dict[str, Any], tmp_path: Path) -> None:
    path = run(tmp_path, "out", {"codes": codes(**options), "distill": TRAINING})
    model = upq.load(path)
    config = model.config.quantization_config.to_dict()
    assert config["activations"]["bits"] == options["activations"].get("bits", 8)
    assert ("kv" in config) == ("kv" in options)
    assert len(config.get("input_scales", {})) == (14 if "static" in options["activations"] else 0)
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert torch.equal(logits(again, "reference"), logits(path, "reference"))
    raw = upq.load(path, dequantize=True)
    with torch.no_grad():
        assert torch.allclose(raw(IDS).logits, logits(path, "reference"), atol=1e-5)
    assert read_manifest(path).metrics["artifact"]["kld"] >= 0
