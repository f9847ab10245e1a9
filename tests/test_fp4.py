"""Tables of levels: the numbers of small floating-point types, their errors, and the compiled products with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import upq
from schemes import fitting
from test_distill import VOCAB, make_config, train
from tiny import tiny_artifact, tiny_model
from upq import kernels
from upq.core.errors import UPQError
from upq.core.levels import E2M1, E3M2, Table, Uniform
from upq.core.scheme import QTensor, QuantScheme
from upq.distill.student import make_student, trained_linears
from upq.grids import GRIDS, check_scheme, scheme_of, search_scale
from upq.grids._table import Nearest
from upq.kernels.weight import Weight
from upq.nn.blocks import model_weights
from upq.nn.fake_quant import Solution
from upq.nn.packed import PackedLinear


def gaussian(rows: int = 64, columns: int = 4096) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def frozen(name: str, w_OI: torch.Tensor, start: str = "mse") -> QTensor:
    scheme, grid = fitting(name), GRIDS.get(name)
    params = search_scale(w_OI, scheme) if start == "mse" else grid.init(w_OI, scheme)
    return grid.freeze(w_OI, params, scheme)


def test_values_are_the_formats() -> None:
    assert E2M1[:8] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert E2M1[8:] == tuple(-value for value in E2M1[:8])
    assert (len(E3M2), len(set(E3M2)), max(E3M2), min(v for v in E3M2 if v > 0)) == (64, 63, 28.0, 0.0625)


def test_ties_go_to_the_even_code_and_zero_has_one() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    rounded = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    near = Nearest(E2M1)
    assert near.level(ties).tolist() == rounded
    assert near.level(-ties).tolist() == [-level for level in rounded]
    assert near.code(torch.tensor([-0.0, 0.0, -0.1, -0.25])).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "start", "error"),
    [
        ("mxfp4", "max", 0.01251),
        ("mxfp4", "mse", 0.01245),
        ("nvfp4", "max", 0.00906),
        ("four_over_six", "max", 0.00755),
    ],
)
def test_errors_on_gaussian_weights(name: str, start: str, error: float) -> None:
    """Within 1 % of what others have computed of the same formats (docs/numerics.md)."""
    w_OI = gaussian()
    found = (frozen(name, w_OI, start).dequantize() - w_OI).square().sum() / w_OI.square().sum()
    assert found.item() == pytest.approx(error, rel=0.01)


def test_the_search_is_at_least_four_over_six() -> None:
    w_OI = gaussian(16, 512)
    searched, chosen = (frozen("nvfp4", w_OI), frozen("four_over_six", w_OI, "max"))
    assert (searched.dequantize() - w_OI).square().sum() < 0.95 * (chosen.dequantize() - w_OI).square().sum()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_scales_are_what_can_be_stored_and_products_exact(name: str) -> None:
    q = frozen(name, gaussian(8, 128))
    scales = q.scales()
    kind = q.scheme.scale
    assert torch.equal(kind.decode(kind.encode(kind.decode(q.scale_OG))), kind.decode(q.scale_OG))
    levels = Table(torch.tensor(E2M1)).of(q.codes_OI.view(8, scales.shape[1], -1))
    exact = (levels.double() * scales.double()[..., None]).view(8, 128)
    assert torch.equal(q.dequantize().double(), exact)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_kernels_multiply_with_the_same_weight(name: str) -> None:
    """On evenly spaced levels of more bits: the weight itself, bit for bit, and its products."""
    layer = PackedLinear.from_qtensor(frozen(name, gaussian(8, 128)))
    weight = layer.kernel_weight()
    assert weight.compiles_on("cpu")
    assert not weight.compiles_on("cuda")
    packed_OB, scale_OG, zero, bits = weight.uniform()
    assert bits == 5
    again = kernels.dequantize(packed_OB, scale_OG, zero, bits=bits, in_features=128, dtype=torch.float32)
    assert torch.equal(again, layer.dequantize())
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ layer.dequantize().double().T
    with kernels.computing("w2a16"):
        torch.testing.assert_close(layer(x).double(), exact, rtol=1e-4, atol=1e-4)
    with kernels.computing("w2a8"):
        assert (layer(x) - exact).norm() < 0.02 * exact.norm()


def test_a_table_of_no_integers_runs_in_torch() -> None:
    table = Table(torch.tensor([-1.0, -0.3, 0.3, 1.0]))
    codes = torch.randint(4, (8, 32), dtype=torch.uint8)
    weight = Weight(kernels.pack(codes, 2), torch.ones(8, 1).half(), table, bits=2, in_features=32)
    assert not weight.compiles_on("cpu")
    x = torch.randn(3, 32)
    with kernels.computing("w2a8"):
        assert torch.equal(kernels.linear(x, weight), x @ table.values[codes.long()].T)


def test_a_table_of_evenly_spaced_levels_gives_the_bytes_of_those() -> None:
    """`arange - zero` as a table is the weight that the zero point is."""
    q = GRIDS.get("seq").freeze(w_OI := gaussian(6, 48), search_scale(w_OI, s := QuantScheme(bits=2)), s)
    assert isinstance(q.levels, Uniform)
    table = Table(torch.arange(4.0) - 1.5)
    assert torch.equal(QTensor(q.codes_OI, q.scale_OG, table, q.scheme).dequantize(), q.dequantize())
    packed_OB = kernels.pack(q.codes_OI, 2)
    (bytes_OB, scale_OG, zero, bits) = Weight(packed_OB, q.scale_OG, table, bits=2, in_features=48).uniform()
    whole = kernels.dequantize(bytes_OB, scale_OG, zero, bits=bits, in_features=48, dtype=torch.float32)
    assert torch.equal(whole, q.dequantize())
    assert torch.equal(bytes_OB, packed_OB)


def test_an_artefact_loads_generates_and_is_as_large_as_it_says(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", scheme=fitting("nvfp4"), intermediate_size=96)
    ids = torch.arange(2, 12)[None]
    with kernels.computing("reference"):
        packed, dense = upq.load(artifact), upq.load(artifact, dequantize=True)
        assert torch.equal(packed(ids).logits, dense(ids).logits)
    compiled = upq.load(artifact)
    found = compiled.generate(ids, max_new_tokens=4, do_sample=False)
    assert found.shape == (1, 14)
    assert compiled.why_not_compiled is None


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_a_training_leaves_what_does_not_learn(name: str, tmp_path: Path) -> None:
    teacher = tiny_model("llama", intermediate_size=96, vocab_size=VOCAB).requires_grad_(False)
    weights = {path: teacher.get_submodule(path).weight for path in model_weights(teacher)}
    scheme = fitting(name)
    start = {path: Solution(w, search_scale(w, scheme), scheme) for path, w in weights.items()}
    student = make_student(teacher, start, train_norms=False)
    before = {path: layer.freeze() for path, layer in trained_linears(student).items()}
    train(student, teacher, make_config(lr=5e-2, scale_lr=1e-1), tmp_path / "c.safetensors", steps=4)
    moved = 0
    for path, layer in trained_linears(student).items():
        q = layer.freeze()
        assert torch.equal(q.dequantize(), layer.fake())
        moved += int((q.codes_OI != before[path].codes_OI).sum())
        if name == "nvfp4":
            assert torch.equal(q.outer_O1, before[path].outer_O1)
            assert not torch.equal(q.scale_OG, before[path].scale_OG)
        else:
            assert torch.equal(q.scale_OG, before[path].scale_OG)
    assert moved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "mxfp4", "bits": 2, "group_size": 32}, "bits=2: grid mxfp4 has 4"),
        ({"grid": "mxfp4", "bits": 4}, "group_size=-1: grid mxfp4 has groups of 32 weights"),
        ({"grid": "nvfp4", "bits": 4, "group_size": 32}, "group_size=32: grid nvfp4 has groups of 16 weights"),
        (
            {"grid": "nvfp4", "bits": 4, "group_size": 16, "scale_dtype": "e8m0"},
            "scale_dtype=e8m0: grid nvfp4 stores scales in e4m3",
        ),
        ({"grid": "seq", "bits": 2, "scale_dtype": "e4m3"}, "scale_dtype=e4m3: grid seq stores scales in float16 or"),
    ],
)
def test_what_a_grid_has_not_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UPQError, match=message):
        scheme_of(**options)


def test_every_grid_has_a_usual_scheme() -> None:
    for name in GRIDS.names():
        check_scheme(fitting(name))
