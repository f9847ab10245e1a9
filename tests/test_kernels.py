"""The compiled CPU kernels against float64 and against the reference, on every instruction set this machine runs."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from upq import kernels
from upq.core.errors import UPQError
from upq.core.levels import Uniform
from upq.core.scheme import QTensor, QuantScheme
from upq.kernels import cpu, reference
from upq.kernels.weight import Weight
from upq.nn.packed import PackedEmbedding, PackedLinear, TiedHead

ISAS = cpu.instruction_sets()
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]
# Half a unit in the last place of the outputs' type, as a relative error.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(autouse=True)
def as_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No choice left over from another test or the environment."""
    monkeypatch.delenv("UPQ_CPU_ISA", raising=False)
    monkeypatch.delenv("UPQ_KERNELS", raising=False)
    kernels.set_compute(None)
    cpu.instruction_set.cache_clear()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    kernels.set_compute(None)
    cpu.instruction_set.cache_clear()


def force(isa: str) -> None:
    cpu.instruction_set.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UPQ_CPU_ISA", isa)
        assert cpu.instruction_set() == isa  # cached from here on


@dataclass
class Case:
    """A weight with its value in float64, a bias and tokens."""

    weight: Weight
    exact_OI: Tensor
    bias_O: Tensor | None
    x: Tensor

    def expected(self, compute: str) -> Tensor:
        """In float64; for w2a8 with the tokens rounded to int8 as the kernels promise to."""
        x = self.x.double()
        if compute == "w2a8":
            x = as_int8(self.x)
        y = x @ self.exact_OI.T
        return y if self.bias_O is None else y + self.bias_O.double()

    def run(self, compute: str) -> Tensor:
        with kernels.computing(compute):
            return kernels.linear(self.x, self.weight, self.bias_O)


def as_int8(x: Tensor) -> Tensor:
    """q · max|x| / 127 with q = round(x · (127 / max|x|)), in float64; numpy rounds halves to even, in float32."""
    rows = x.float().numpy().reshape(-1, x.shape[-1])
    peak = np.abs(rows).max(1, keepdims=True)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 2.0**-120)
    q = np.rint(rows * inverse).astype(np.float64)
    return torch.from_numpy(q * (peak / np.float32(127)).astype(np.float64)).view(x.shape)


def make(
    rows: int,
    columns: int,
    *,
    groups: int = 1,
    bits: int = 2,
    tokens: int | tuple[int, ...] = 3,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype = torch.float16,
    zeros: bool = False,
    bias: bool = False,
    mean: float = 0.0,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    codes_OI = torch.randint(1 << bits, (rows, columns), generator=g).to(torch.uint8)
    scale_OG = (torch.rand(rows, groups, generator=g) * 0.02 + 0.001).to(scale_dtype)
    zero: Tensor | float = ((1 << bits) - 1) / 2
    if zeros:
        zero = torch.randint(1 << bits, (rows, groups), generator=g).to(scale_dtype)
    batch = tokens if isinstance(tokens, tuple) else (tokens,)
    x = torch.randn(*batch, columns, generator=g) + mean
    x = torch.where(torch.rand(x.shape, generator=g) < 0.01, x * 30, x).to(dtype)  # outliers
    zero_OG1 = zero.double()[..., None] if isinstance(zero, Tensor) else zero
    exact_OGS = (codes_OI.view(rows, groups, -1).double() - zero_OG1) * scale_OG.double()[..., None]
    weight = Weight(reference.pack(codes_OI, bits), scale_OG, zero, bits=bits, in_features=columns)
    return Case(weight, exact_OGS.view(rows, columns), torch.randn(rows, generator=g).to(dtype) if bias else None, x)


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def error_of(y: Tensor, case: Case, compute: str) -> float:
    """Relative to the products, or to the size they would have by chance where they happen to cancel."""
    expected = case.expected(compute)
    size = (case.x.double().abs() @ case.exact_OI.abs().T).norm() / case.x.shape[-1] ** 0.5
    return float((y.double() - expected).norm() / torch.maximum(expected.norm(), size).clamp_min(1e-300))


LIMIT = {"w2a8": 1e-6, "w2a16": 1e-5}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    grouped = draw(st.booleans())
    longest = draw(st.sampled_from([700, 1800]))  # 768 columns of 2 bits are unpacked at a time
    size = 8 * draw(st.integers(1, 20)) if grouped else draw(st.integers(1, longest))
    groups = draw(st.integers(1, max(1, longest // size))) if grouped else 1
    return make(
        draw(st.integers(1, 200)),
        size * groups,
        groups=groups,
        bits=draw(st.sampled_from([2, 3, 4, 8])),
        tokens=draw(st.integers(1, 40 if longest < 1000 else 140)),
        dtype=draw(st.sampled_from(DTYPES)),
        scale_dtype=draw(st.sampled_from(DTYPES)),
        zeros=draw(st.booleans()),
        bias=draw(st.booleans()),
        mean=draw(st.sampled_from([0.0, 0.5, -3.0])),
        seed=draw(st.integers(0, 1 << 30)),
    )


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(case=cases(), threads=st.sampled_from([1, 2]))
def test_products_are_right(isa: str, case: Case, threads: int) -> None:
    force(isa)
    torch.set_num_threads(threads)
    for compute, limit in LIMIT.items():
        y = case.run(compute)
        assert y.dtype == case.x.dtype
        assert error_of(y, case, compute) <= limit + ROUNDING[y.dtype], compute


@pytest.mark.parametrize("bits", range(2, 9))
def test_w2a16_comes_near_the_reference(bits: int) -> None:
    case = make(70, 96, groups=3, bits=bits, zeros=bits % 2 == 0, bias=True, tokens=9)
    assert relative_error(case.run("w2a16"), case.run("reference").double()) <= 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_every_instruction_set_computes_the_same_bits(bits: int, zeros: bool) -> None:
    for (tokens, groups), dtype in itertools.product(((1, 5), (2, 5), (3, 5), (9, 5), (30, 25)), DTYPES):
        case = make(
            77, 40 * groups, groups=groups, bits=bits, zeros=zeros, tokens=tokens, dtype=dtype, bias=True, mean=0.3
        )
        found, near = [], []
        for isa in ISAS:
            force(isa)
            found.append(case.run("w2a8"))
            near.append(case.run("w2a16").double())
        for isa, y, z in zip(ISAS[1:], found[1:], near[1:], strict=True):
            assert torch.equal(y, found[0]), isa
            # sums of floats differ by what a fused product saves of rounding
            assert relative_error(z, near[0]) <= 1e-6 + 2 * ROUNDING[dtype], isa


@pytest.mark.parametrize("compute", LIMIT)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("tokens", "columns"), [((4, 5), 90), ((7, 10), 1700)], ids=["few", "many"])
def test_an_output_depends_on_its_token_and_its_row_alone(
    isa: str, compute: str, tokens: tuple[int, int], columns: int
) -> None:
    """Not on the batch, the number of threads, the other matrices or where the row stands among them."""
    force(isa)
    case = make(150, columns, tokens=tokens, bias=True)
    alone = case.run(compute)
    assert alone.shape == (*tokens, 150)
    with kernels.computing(compute):  # type: ignore[arg-type]
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(kernels.linear(case.x, case.weight, case.bias_O), alone)
        one_by_one = [kernels.linear(x, case.weight, case.bias_O) for x in case.x.flatten(0, 1)]
        assert torch.equal(torch.stack(one_by_one).view_as(alone), alone)
        others = [
            make(33, columns, bits=4, seed=1),
            make(5, columns, groups=columns // 10, bits=8, seed=2),
            make(64, columns, zeros=True, seed=3),
        ]
        weights, biases = [o.weight for o in others], [None, None, None]
        separate = [kernels.linear(case.x, w) for w in weights]
        together = kernels.linears(case.x, [*weights, case.weight], [*biases, case.bias_O])
        for one, other in zip([*separate, alone], together, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_tokens_give_zeros_and_broken_ones_nan(isa: str, dtype: torch.dtype) -> None:
    force(isa)
    case = make(40, 64, groups=2, tokens=5, dtype=dtype)
    case.x[1] = 0
    case.x[2, 7] = torch.nan
    case.x[3, 60] = -torch.inf
    whole = make(40, 64, groups=2, tokens=5, dtype=dtype)
    y, sound = case.run("w2a8"), whole.run("w2a8")
    assert not y[1].any()
    assert y[2].isnan().all()
    assert y[3].isnan().all()
    assert torch.equal(y[[0, 4]], sound[[0, 4]])
    floats = case.run("w2a16")
    assert not floats[1].any()
    assert floats[2].isnan().all()
    assert not floats[3].isfinite().any()
    assert torch.equal(floats[[0, 4]], whole.run("w2a16")[[0, 4]])


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_magnitudes(isa: str) -> None:
    force(isa)
    case = make(9, 40, tokens=4)
    case.x[0] *= 1e30
    case.x[1] *= 1e-30
    case.x[2] = 1e-38  # below what can be scaled up: counts as zeros
    case.x[3] = torch.finfo(torch.float32).max
    y, expected = case.run("w2a8"), case.expected("w2a8")
    assert not y[2].any()
    for token in (0, 1, 3):
        assert relative_error(y[token], expected[token]) <= 1e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_largest_sums_do_not_overflow(isa: str, bits: int) -> None:
    """Rows of more than two segments, every code and every activation the largest there is."""
    force(isa)
    columns = 70_001
    codes = torch.full((3, columns), (1 << bits) - 1, dtype=torch.uint8)
    codes[1] = 0
    scale = torch.ones(3, 1)
    for zero in (0.0, torch.zeros(3, 1), ((1 << bits) - 1) / 2):
        weight = Weight(reference.pack(codes, bits), scale, zero, bits=bits, in_features=columns)
        x = torch.full((24, columns), 127.0)
        offset = float(zero.max()) if isinstance(zero, Tensor) else zero
        expected = (codes.double() - offset).sum(1) * 127
        for compute, limit in LIMIT.items():
            with kernels.computing(compute):  # type: ignore[arg-type]
                y = kernels.linear(x, weight)[[0, -1]].double()
            # Equal terms round the same way each time, up to 1.6e-5 over these columns in float.
            torch.testing.assert_close(y, expected.expand_as(y), rtol=3 * limit, atol=0)


def test_forms_of_the_input() -> None:
    case = make(20, 30, tokens=(2, 3))
    expected = case.run("w2a8")
    assert torch.equal(kernels.linear(case.x.transpose(0, 1), case.weight), expected.transpose(0, 1))
    assert torch.equal(kernels.linear(case.x[0, 0], case.weight), expected[0, 0])
    assert kernels.linear(case.x[:0], case.weight).shape == (0, 3, 20)
    wide = torch.cat([case.x, case.x], -1)
    assert torch.equal(kernels.linear(wide[..., :30], case.weight), expected)
    with pytest.raises(UPQError, match="x has 60 features, the packed weight 30"):
        kernels.linear(wide, case.weight)
    with pytest.raises(UPQError, match=r"not torch\.float64"):
        kernels.linear(case.x.double(), case.weight)


def test_bad_weights_are_refused() -> None:
    good = make(4, 16).weight
    with pytest.raises(UPQError, match="no weight of 20 columns at 2 bits"):
        cpu.pack(good.packed_OB, good.scale_OG, 1.5, bits=2, in_features=20)
    with pytest.raises(UPQError, match="no weight"):
        cpu.pack(good.packed_OB, good.scale_OG[:3], 1.5, bits=2, in_features=16)
    with pytest.raises(UPQError, match="no weight"):
        cpu.pack(good.packed_OB[:0], good.scale_OG[:0], 1.5, bits=2, in_features=16)


# --- choosing ------------------------------------------------------------------------------------------------------


def test_the_choice_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.compute() == "w2a8"
    monkeypatch.setenv("UPQ_KERNELS", "reference")
    kernels.set_compute(None)
    assert kernels.compute() == "reference"
    kernels.set_compute("w2a16")
    with kernels.computing("w2a8"):
        assert kernels.compute() == "w2a8"
    assert kernels.compute() == "w2a16"
    kernels.set_compute(None)
    monkeypatch.setenv("UPQ_KERNELS", "fast")
    kernels.set_compute(None)
    with pytest.raises(UPQError, match="UPQ_KERNELS: unknown kernels 'fast'; choose one of w2a8, w2a16, reference"):
        kernels.compute()


@pytest.mark.parametrize("name", ["sse9", "neon"])
def test_an_instruction_set_that_is_not_there_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ISAS:
        pytest.skip(f"this machine has {name}")
    monkeypatch.setenv("UPQ_CPU_ISA", name)
    with pytest.raises(UPQError, match=f"UPQ_CPU_ISA={name}: this build on this machine runs .*portable"):
        make(4, 16).run("w2a8")


def test_without_the_compiled_module_nothing_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(4, 16)
    monkeypatch.setitem(__import__("sys").modules, "upq.kernels._cpu", None)
    monkeypatch.delattr(kernels, "_cpu", raising=False)
    cpu.extension.cache_clear()
    try:
        with pytest.raises(UPQError, match=r"the CPU kernels are not there .* UPQ_KERNELS=reference"):
            case.run("w2a8")
        assert relative_error(case.run("reference"), case.expected("reference")) <= 1e-6
    finally:
        cpu.extension.cache_clear()


def test_a_gradient_is_refused_and_not_forgotten() -> None:
    case = make(4, 16, bias=True)
    expected = case.run("w2a8")
    case.x.requires_grad_()
    y = case.run("w2a8")
    assert y.requires_grad
    assert torch.equal(y, expected)
    with pytest.raises(UPQError, match="have no gradient"):
        y.sum().backward()
    case.run("reference").sum().backward()
    assert case.x.grad is not None
    with torch.no_grad():
        assert not case.run("w2a8").requires_grad


# --- in the layers -------------------------------------------------------------------------------------------------


def value(rows: int, columns: int, scheme: QuantScheme, *, zero: float | None = None, seed: int = 0) -> QTensor:
    g = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    zeros = torch.full((rows, groups), (scheme.levels - 1) / 2 if zero is None else zero)
    codes = torch.randint(scheme.levels, (rows, columns), generator=g).to(torch.uint8)
    return QTensor(codes, (torch.rand(rows, groups, generator=g) + 0.1).half(), Uniform(zeros), scheme)


def near_its_weight(layer: nn.Module, weight_OI: Tensor) -> bool:
    """Whether the layer computes products with this weight, within the rounding of its tokens to int8."""
    x = torch.randn(3, weight_OI.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return relative_error(layer(x), x.double() @ weight_OI.double().T) < 0.02


@pytest.mark.parametrize(("grid", "zero"), [("seq", None), ("sym", 2.0), ("affine", 1.0)])
def test_layers_use_the_kernels(grid: str, zero: float | None) -> None:
    q = value(21, 48, QuantScheme(bits=2, group_size=16, grid=grid), zero=zero)
    layer, table = PackedLinear.from_qtensor(q, torch.randn(21)), PackedEmbedding.from_qtensor(q)
    x = torch.randn(2, 3, 48)
    exact = x @ q.dequantize().T
    with torch.no_grad():
        for module, expected in ((layer, exact + layer.bias), (TiedHead(table), exact)):
            fast = module(x)
            assert not torch.equal(fast, expected)
            assert relative_error(fast, expected.double()) < 0.02
            with kernels.computing("w2a16"):
                assert relative_error(module(x), expected.double()) < 1e-5


def test_state_is_the_file_layout_before_and_after_a_product() -> None:
    layer = PackedLinear.from_qtensor(value(7, 40, QuantScheme(bits=2)))
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    layer(torch.randn(1, 40))
    after = layer.state_dict()
    assert list(after) == ["weight_packed", "weight_scale"]
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_other_weights_are_noticed() -> None:
    scheme = QuantScheme(bits=2)
    first, second, third = (value(7, 40, scheme, seed=seed) for seed in range(3))
    layer = PackedLinear.from_qtensor(first)
    assert near_its_weight(layer, first.dequantize())
    held = layer.kernel_weight()
    layer(torch.randn(1, 40))
    assert layer.kernel_weight() is held  # rearranged once
    layer.load_state_dict(PackedLinear.from_qtensor(second).state_dict())  # written into the buffers
    assert near_its_weight(layer, second.dequantize())
    layer.load_state_dict(PackedLinear.from_qtensor(third).state_dict(), assign=True)  # buffers replaced
    assert near_its_weight(layer, third.dequantize())
    doubled = 2 * third.dequantize()
    layer.weight_scale *= 2  # of `third` too: they share it
    assert near_its_weight(layer, doubled)
    assert near_its_weight(layer.to(torch.bfloat16).to(torch.float32), doubled)


def test_copies_and_pickles_have_weights_of_their_own() -> None:
    q = value(7, 40, QuantScheme(bits=2))
    layer = PackedLinear.from_qtensor(q)
    layer(torch.randn(1, 40))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert near_its_weight(twin, q.dequantize())
        twin.weight_scale *= 2
        assert near_its_weight(twin, 2 * q.dequantize())
    assert near_its_weight(layer, q.dequantize())


def test_inference_mode() -> None:
    q = value(7, 40, QuantScheme(bits=2))
    with torch.inference_mode():
        layer = PackedLinear.from_qtensor(q)
        assert near_its_weight(layer, q.dequantize())
    assert near_its_weight(layer, q.dequantize())
