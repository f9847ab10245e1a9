"""What products on a GPU obey, against float64 and bit for bit.

Run by test_kernels_cuda.py in a process of its own: with TRITON_INTERPRET=1 in Triton's interpreter on the CPU, without
it on a CUDA device.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

import upq
from pairwise import pairwise
from tiny import tiny_artifact
from upq import kernels
from upq.core.errors import UPQError
from upq.core.scheme import QuantScheme
from upq.kernels import cuda, dequantize, pack
from upq.kernels.weight import Weight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import interpreted

    interpreted.install()
DEVICE = "cpu" if INTERPRETED else "cuda"
# Half a unit in the last place, relative: results are rounded once, and so are weights in groups. On average either
# rounding is a third of this.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = [*ROUNDING]


def make(
    rows: int, columns: int, groups: int = 1, *, bits: int = 2, zeros: bool = False, scale: torch.dtype = torch.float16
) -> tuple[Weight, Tensor]:
    """A random weight, and its value in float64."""
    g = torch.Generator().manual_seed(rows + columns + groups + bits)
    codes_OI = torch.randint(1 << bits, (rows, columns), generator=g).to(torch.uint8)
    scale_OG = (torch.rand(rows, groups, generator=g) * 0.02 + 0.001).to(scale)
    zero: Tensor | float = ((1 << bits) - 1) / 2
    if zeros:
        zero = torch.randint(1 << bits, (rows, groups), generator=g).to(scale)
    zero_OG1 = zero.double()[..., None] if isinstance(zero, Tensor) else zero
    value_OGS = (codes_OI.view(rows, groups, -1).double() - zero_OG1) * scale_OG.double()[..., None]
    tensors = [pack(codes_OI, bits), scale_OG, zero]
    packed_OB, scale_OG, zero = (t.to(DEVICE) if isinstance(t, Tensor) else t for t in tensors)
    weight = Weight(packed_OB, scale_OG, zero, bits=bits, in_features=columns)
    return weight, value_OGS.view(rows, columns)


def tokens(m: int, columns: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(m, columns, generator=torch.Generator().manual_seed(m))
    return torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.01, x * 30, x).to(dtype)


def product(x: Tensor, weight: Weight, bias_O: Tensor | None = None) -> Tensor:
    [y] = cuda.linears(x.to(DEVICE), [weight.cuda_matrix()], [None if bias_O is None else bias_O.to(DEVICE)])
    assert y.dtype == x.dtype
    return y.cpu()


def error(y: Tensor, x: Tensor, value_OI: Tensor, bias_O: Tensor | None = None) -> float:
    expected = x.double() @ value_OI.T
    if bias_O is not None:
        expected += bias_O.double()
    return float((y.double() - expected).norm() / expected.norm())


SHAPES = [(37, 96, 1), (1, 32, 1), (32, 160, 5), (67, 128, 2)]


@pairwise(shape=SHAPES, bits=cuda.BITS, dtype=DTYPES)
def test_products_are_right(shape: tuple[int, int, int], bits: int, dtype: torch.dtype) -> None:
    rows, columns, groups = shape
    for m in (1, 8, 17, 66):
        zeros, bias = m % 2 == 0, m > 8
        weight, value_OI = make(rows, columns, groups, bits=bits, zeros=zeros)
        bias_O = torch.randn(rows, generator=torch.Generator().manual_seed(0)).to(dtype) if bias else None
        x = tokens(m, columns, dtype)
        assert error(product(x, weight, bias_O), x, value_OI, bias_O) <= ROUNDING[dtype], m


@pairwise(bits=cuda.BITS, groups=[1, 4], form=[(False, torch.float16), (True, torch.bfloat16)])
def test_weights_are_exact(bits: int, groups: int, form: tuple[bool, torch.dtype]) -> None:
    """Ones and zeros for x bring out the columns: bit for bit the weight, rounded once to the type of x."""
    (zeros, scale), rows, columns = form, 29, 128
    weight, value_OI = make(rows, columns, groups, bits=bits, zeros=zeros, scale=scale)
    for dtype in DTYPES:
        expected_OI = dequantize(
            weight.packed_OB, weight.scale_OG, weight.zero, bits=bits, in_features=columns, dtype=dtype
        ).cpu()
        assert torch.equal(expected_OI, value_OI.to(dtype))
        one_hot = torch.eye(columns, dtype=dtype)
        for chosen in (slice(None), slice(101, 102), slice(60, 68)):  # by each of gemlite's kernels
            assert torch.equal(product(one_hot[chosen], weight), expected_OI.T[chosen]), (dtype, chosen)


def test_sums_of_many_columns_are_rounded_once() -> None:
    """In parts they would be added up in the type of the output, a hundred roundings of bfloat16 at one token."""
    rows, columns = 32, 4096
    weight, value_OI = make(rows, columns)
    for dtype in DTYPES:
        for m in (1, 8):
            x = tokens(m, columns, dtype)
            expected = (x.double() @ value_OI.T).float()
            y = product(x, weight).float()
            # nearest, but for float32 sums that end up beside a boundary
            assert (y != expected.to(dtype).float()).double().mean() <= 0.02, (dtype, m)


@pytest.mark.skipif(not INTERPRETED, reason="on a device the clock chooses the tiles")
@pytest.mark.parametrize(("bits", "m", "groups"), [(2, 1, 5), (8, 1, 5), (2, 7, 1), (2, 7, 5), (2, 65, 1), (2, 65, 5)])
def test_every_tile_is_right_and_reads_nothing_it_may_not(
    bits: int, m: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gemlite reads scales and zeros without a mask; what lies behind the room they have been given is NaN here."""
    rows, columns = 40, 160
    monkeypatch.setattr(cuda, "_ROWS", 24)  # no more than its tiles of 64 rows need, so that it hides no missing group
    weight, value_OI = make(rows, columns, groups, bits=bits, zeros=True)
    matrix = weight.cuda_matrix()
    matrix = dataclasses.replace(matrix, scale_GO=amid_nan(matrix.scale_GO), zero=amid_nan(matrix.zero))
    x = tokens(m, columns, torch.float16)
    number = 0
    while interpreted.TILES.timed >= number:
        interpreted.TILES.choose(number)
        [y] = cuda.linears(x, [matrix], [None])
        assert error(y, x, value_OI) <= ROUNDING[torch.float16], number
        number += 1
    assert number > 3


def amid_nan(values: Tensor) -> Tensor:
    """The same values, and the same memory behind them, but NaN behind that."""
    own = torch.tensor([], dtype=values.dtype).set_(values.untyped_storage())
    around = torch.full((len(own) + 2**18,), torch.nan)
    around[: len(own)] = own
    return around.as_strided(values.shape, values.stride())


def test_forms_of_the_input() -> None:
    weight, value_OI = make(20, 64, 2)
    x = tokens(6, 64, torch.float16).view(2, 3, 64)
    y = product(x, weight)
    assert error(y, x, value_OI) <= ROUNDING[torch.float16]
    assert torch.equal(product(x.transpose(0, 1), weight), y.transpose(0, 1))
    assert product(x[0, 0], weight).shape == (20,)
    assert product(x[:0], weight).shape == (0, 3, 20)
    wide = torch.cat([x, x], -1)
    assert torch.equal(product(wide[..., :64], weight), y)
    several = cuda.linears(x.to(DEVICE), [weight.cuda_matrix(), make(5, 64)[0].cuda_matrix()], [None, None])
    assert torch.equal(several[0].cpu(), y)
    assert several[1].shape == (2, 3, 5)
    with pytest.raises(UPQError, match="x has 128 features, the packed weight 64"):
        product(wide, weight)
    with pytest.raises(UPQError, match=r"float16 and bfloat16, not torch\.float32; cast, or UPQ_KERNELS=reference"):
        product(x.float(), weight)


def test_more_outputs_than_32_bits_count_come_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, value_OI = make(20, 32)
    x = tokens(7, 32, torch.float16)
    weight.cuda_matrix()
    own, seen = cuda._product(), []

    def counted(x: Tensor, *rest: object) -> Tensor:
        seen.append(len(x))
        return own(x, *rest)

    monkeypatch.setattr(cuda, "_ELEMENTS", 3 * 32 + 1)
    monkeypatch.setattr(cuda, "_product", lambda: counted)
    assert error(product(x.view(1, 7, 32), weight), x, value_OI) <= ROUNDING[torch.float16]
    assert seen == [3, 3, 1]


def test_a_gradient_is_refused_and_not_forgotten() -> None:
    weight, _ = make(5, 32)
    x = tokens(3, 32, torch.float16)
    expected = product(x, weight)
    y = product(x.requires_grad_(), weight)
    assert y.requires_grad
    assert torch.equal(y, expected)
    with pytest.raises(UPQError, match="the CUDA kernels have no gradient"):
        y.sum().backward()


def test_inference_mode() -> None:
    weight, value_OI = make(9, 64)
    x = tokens(3, 64, torch.bfloat16)
    with torch.inference_mode():
        y = product(x, weight)
    assert error(y, x, value_OI) <= ROUNDING[torch.bfloat16]
    assert torch.equal(product(x, weight), y)


def test_a_model_is_as_near_as_through_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks at 2 bits in groups, embedding and head at 4 with one scale a row, activations in bfloat16."""
    scheme, shape = QuantScheme(bits=2, group_size=32), {"hidden_size": 64, "head_dim": 16}
    artifact = tiny_artifact(
        tmp_path / "artifact", scheme=scheme, dtype=torch.bfloat16, embeddings_bits=4, intermediate_size=96, **shape
    )
    ids = torch.tensor([[5, 80, 211, 7, 33]])
    with torch.no_grad(), kernels.computing("reference"):
        exact = upq.load(artifact, dtype=torch.float32)(ids).logits.double()
        model = upq.load(artifact, device=DEVICE)
        rounded = model(ids.to(DEVICE)).logits.cpu().double()
    if INTERPRETED:
        monkeypatch.setattr(kernels, "linears", linears)
    with torch.no_grad():
        own = model(ids.to(DEVICE)).logits.cpu().double()
    assert not torch.equal(own, rounded)
    assert float((own - exact).norm()) <= 1.5 * float((rounded - exact).norm())


def linears(x: Tensor, weights: list[Weight], biases_O: list[Tensor | None] | None = None) -> list[Tensor]:
    """What kernels.linears does on a GPU."""
    return cuda.linears(x, [w.cuda_matrix() for w in weights], biases_O or [None] * len(weights))
