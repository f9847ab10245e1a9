"""Codes that stay while scales learn: against the latents they come from, the plain form, and a training of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from pairwise import pairwise
from schemes import PLAIN, SCALAR, fitting
from test_distill import Losses, Random, make_config, make_teacher, train
from upq.blockwise import BlockStore, Solution
from upq.core.levels import Uniform
from upq.core.scheme import PER_CHANNEL, QTensor, QuantScheme, to_groups
from upq.distill.student import Starts, make_student, trained_linears
from upq.files.tensors import load_tensors
from upq.grids import learned, search_scale
from upq.nn.blocks import model_weights
from upq.nn.fake_quant import FakeQuantLinear
from upq.nn.fixed_codes import Coded, FixedCodesLinear

ROWS, COLUMNS = 6, 96
CPU = torch.device("cpu")


def solved(scheme: QuantScheme, seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> Solution:
    latent_OI = 0.3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    params = search_scale(latent_OI, scheme)
    params |= {key: value + 0.1 for key, value in learned(params, scheme).items()}  # of no level's own size
    return Solution(latent_OI, params, scheme)


def same_codes(a: QTensor, b: QTensor) -> bool:
    pairs = [(getattr(a, part), getattr(b, part)) for part in ("codes_OI", "scale_OG")]
    pairs.append((a.dequantize(), b.dequantize()))
    if isinstance(a.levels, Uniform):
        pairs.append((a.zero_OG, b.zero_OG))
    return a.scheme == b.scheme and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


@pairwise(grid=SCALAR, group_size=[PER_CHANNEL, 8, 24], bits=range(2, 9), bias=[False, True])
def test_it_starts_as_the_latents_do(
    grid: str, group_size: int, bits: int, bias: bool, tmp_path: Path, device: str
) -> None:
    scheme = fitting(grid, bits=bits, group_size=group_size)
    solution, store = solved(scheme), BlockStore(tmp_path, scheme, latents=False)
    store.save(0, {"x": solution}, {})
    (coded,) = store.solutions(0).values()
    assert isinstance(coded, Coded)
    assert same_codes(coded.qtensor(), solution.qtensor())
    bias_O = torch.randn(ROWS, device=device) if bias else None
    fixed, fake = (start.layer(bias_O, torch.device(device)) for start in (coded, solution))
    assert torch.equal(fixed.fake(), fake.fake())
    assert same_codes(fixed.freeze(), fake.freeze())
    x = torch.randn(5, 3, COLUMNS, device=device)
    assert torch.equal(fixed(x), fake(x))
    assert fixed.shape == fake.shape == (ROWS, COLUMNS)


@pairwise(grid=SCALAR, group_size=[PER_CHANNEL, 8], autocast=[False, True])
def test_gradients_are_those_of_the_plain_form(grid: str, group_size: int, autocast: bool, device: str) -> None:
    scheme = fitting(grid, group_size=group_size)
    coded = Coded.of(solved(scheme).qtensor(), solved(scheme).params)
    layer = coded.layer(torch.randn(ROWS, device=device), torch.device(device))
    x, g = torch.randn(5, COLUMNS, device=device), torch.randn(5, ROWS, device=device)

    def gradients(plain: bool) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = F.linear(leaf, layer.fake(), layer.bias) if plain else layer(leaf)
        y.backward(g.to(y.dtype))
        learning = [p.grad for p in layer.grid_params.values() if p.requires_grad]
        return [y.detach(), leaf.grad, *learning]  # type: ignore[list-item]

    for found, expected in zip(gradients(plain=False), gradients(plain=True), strict=True):
        assert torch.equal(found, expected)
    assert layer.packed.grad is None


@pytest.mark.parametrize("group_size", [PER_CHANNEL, 8])
@pytest.mark.parametrize("grid", SCALAR)
def test_the_gradient_of_a_scale_is_how_the_weights_move_with_it(grid: str, group_size: int) -> None:
    """`dŴ/d log s = Ŵ`: in float64, by hand, of what the grid calls its scale; and `dŴ/dz = -s`."""
    scheme = fitting(grid, group_size=group_size, scale_dtype="float32")
    solution = solved(scheme)
    layer = Coded.of(solution.qtensor(), solution.params).layer(None, CPU)
    g_OI = torch.randn(ROWS, COLUMNS)
    if not any(p.requires_grad for p in layer.grid_params.values()):
        assert not layer.fake().requires_grad
        return
    (layer.fake() * g_OI).sum().backward()
    w_OGS, g_OGS = (to_groups(t.detach().double(), scheme) for t in (layer.fake(), g_OI))
    scale_OG = layer.freeze().scales().double()
    # Straight through the rounding of a scale: to a byte it moves it by a sixteenth at most.
    rtol = {"float32": 1e-4, "float16": 1e-3}.get(scheme.scale_dtype, 2**-4)
    for name, parameter in learned(dict(layer.grid_params), scheme).items():
        if name == "ratio":  # of R2Q: the second sign
            signs_OGS = to_groups(layer.freeze().codes_OI, scheme).double() % 2 * 2 - 1
            expected = scale_OG * (g_OGS * signs_OGS).sum(-1)
        else:
            expected = (w_OGS * g_OGS).sum(-1) if name.startswith("log_") else -scale_OG * g_OGS.sum(-1)
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=rtol, atol=1e-6)  # type: ignore[union-attr]


def starts(scheme: QuantScheme, *, latents: bool) -> tuple[torch.nn.Module, Starts]:
    teacher = make_teacher()
    weights = {path: teacher.get_submodule(path).weight for path in model_weights(teacher)}
    solutions = {path: Solution(w, search_scale(w, scheme), scheme) for path, w in weights.items()}
    return teacher, solutions if latents else {p: Coded.of(s.qtensor(), s.params) for p, s in solutions.items()}


def codes_of(student: PreTrainedModel) -> dict[str, QTensor]:
    return {path: layer.freeze() for path, layer in trained_linears(student).items()}


@pytest.mark.parametrize("grid", PLAIN)
def test_a_training_moves_scales_and_norms_alone(grid: str, tmp_path: Path) -> None:
    scheme, config = QuantScheme(bits=2, grid=grid), make_config(train_norms=True, train_weights=False, scale_lr=1e-2)
    teacher, coded = starts(scheme, latents=False)
    student = make_student(teacher, coded, train_norms=True)
    before = codes_of(student)
    seen = Losses()
    train(student, teacher, config, tmp_path / "c.safetensors", steps=30, data=Random(), progress=seen)
    after = codes_of(student)
    for path, q in before.items():
        assert torch.equal(q.codes_OI, after[path].codes_OI)
        assert not torch.equal(q.scale_OG, after[path].scale_OG)
    assert sum(seen.values[-5:]) < 0.97 * sum(seen.values[:5])
    # The checkpoint: scales, norms and their moments; of the codes nothing.
    shapes = {name: tuple(t.shape) for name, t in load_tensors(tmp_path / "c.safetensors")[0].items()}
    assert {name for name in shapes if name.startswith("model:")}
    assert not any("packed" in name for name in shapes)
    assert all(len(shape) < 2 or shape[-1] == 1 for shape in shapes.values())


def test_resumed_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    scheme, config = QuantScheme(bits=2), make_config(train_norms=True, train_weights=False, checkpoint_every=2)
    teacher, coded = starts(scheme, latents=False)
    whole, resumed = (make_student(teacher, coded, train_norms=True) for _ in range(2))
    train(whole, teacher, config, tmp_path / "a.safetensors", steps=6, data=Random())
    for steps in (2, 6):  # a fresh student each time, as a fresh process has one
        resumed = make_student(teacher, coded, train_norms=True)
        train(resumed, teacher, config, tmp_path / "b.safetensors", steps=steps, data=Random())
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_student_of_codes_takes_two_bits_a_weight() -> None:
    scheme = QuantScheme(bits=2)
    sizes = {}
    for latents in (True, False):
        teacher, start = starts(scheme, latents=latents)
        student = make_student(teacher, start, train_norms=False)
        layers = trained_linears(student).values()
        assert {type(layer) for layer in layers} == {FakeQuantLinear if latents else FixedCodesLinear}
        sizes[latents] = sum(p.nbytes for layer in layers for p in layer.parameters())
    weights = sum(q.codes_OI.numel() for q in codes_of(student).values())
    rows = sum(len(q.scale_OG) for q in codes_of(student).values())
    assert sizes == {True: 4 * weights + 4 * rows, False: weights // 4 + 4 * rows}


@pytest.mark.parametrize("latents", [False, True])
def test_zero_points_that_do_not_train_are_those_that_were_stored(latents: bool, tmp_path: Path) -> None:
    """Bit for bit, killed and resumed too, while scales learn."""
    scheme, shared = QuantScheme(bits=2, grid="affine"), {"train_weights": latents, "scale_lr": 1e-2}
    teacher, start = starts(scheme, latents=latents)

    def trained(name: str, *steps: int, zeros: bool) -> tuple[dict[str, QTensor], dict[str, Tensor]]:
        for total in steps:
            student = make_student(teacher, start, train_norms=False)
            config = make_config(**shared, train_zeros=zeros, checkpoint_every=2)
            train(student, teacher, config, tmp_path / name, steps=total, data=Random())
        params = {
            f"{path}:{key}": p for path, each in trained_linears(student).items() for key, p in each.grid_params.items()
        }
        return codes_of(student), params

    kept, params = trained("kept", 6, zeros=False)
    moved, _ = trained("moved", 6, zeros=True)
    for path, q in kept.items():
        before = start[path].qtensor()
        assert torch.equal(q.zero_OG, before.zero_OG)
        assert torch.equal(params[f"{path}:zero"], start[path].params["zero"])
        assert not torch.equal(q.scale_OG, before.scale_OG)
    assert any(not torch.equal(moved[path].scale_OG, q.scale_OG) for path, q in kept.items())
    resumed = trained("resumed", 2, 6, zeros=False)[1]
    assert all(torch.equal(value, params[name]) for name, value in resumed.items())
