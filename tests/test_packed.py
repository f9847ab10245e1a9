"""Packed layers: through the reference kernels, what they compute is what was trained, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pairwise import pairwise
from upq.core.scheme import PER_CHANNEL, QuantScheme
from upq.grids import GRIDS, search_scale
from upq.nn.fake_quant import FakeQuantLinear
from upq.nn.packed import PackedEmbedding, PackedLinear, TiedHead, dense_like

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


pytestmark = pytest.mark.usefixtures("reference")


def fake_linear(rows: int, columns: int, scheme: QuantScheme, bias: bool, dtype: torch.dtype) -> FakeQuantLinear:
    torch.manual_seed(rows * columns)
    w = torch.randn(rows, columns)
    return FakeQuantLinear(w, search_scale(w, scheme), scheme, torch.randn(rows, dtype=dtype) if bias else None)


@pairwise(
    shape=[(32, PER_CHANNEL), (45, PER_CHANNEL), (48, 16), (1, PER_CHANNEL)],
    bits=range(2, 9),
    grid=GRIDS.names(),
    dtype=DTYPES,
)
def test_linear_equals_what_was_trained(
    shape: tuple[int, int], bits: int, grid: str, dtype: torch.dtype, device: str
) -> None:
    columns, group_size = shape
    scheme = QuantScheme(bits=bits, group_size=group_size, grid=grid)
    trained = fake_linear(7, columns, scheme, bits % 2 == 0, dtype).to(device)
    packed = PackedLinear.from_qtensor(trained.freeze(), trained.bias)
    x = torch.randn(2, 3, columns, dtype=dtype).to(device)
    assert torch.equal(packed(x), trained(x))
    assert torch.equal(packed.dequantize(), trained.fake())
    dense = dense_like(packed, dtype)
    assert type(dense) is nn.Linear
    assert torch.equal(dense(x), packed(x))


@pairwise(grid=GRIDS.names(), bits=[3, 4, 8], dtype=DTYPES)
def test_embedding_and_tied_head_equal_the_dense_table(grid: str, bits: int, dtype: torch.dtype) -> None:
    scheme = QuantScheme(bits=bits, grid=grid)
    q = fake_linear(11, 13, scheme, False, dtype).freeze()
    embedding = PackedEmbedding.from_qtensor(q, dtype)
    table = q.dequantize().to(dtype)
    ids = torch.tensor([[0, 10, 3], [3, 3, 7]])
    assert torch.equal(embedding(ids), table[ids])
    assert embedding(ids[:, :0]).shape == (2, 0, 13)
    dense = dense_like(embedding, dtype)
    assert type(dense) is nn.Embedding
    assert torch.equal(dense(ids), table[ids])
    head = TiedHead(embedding)
    assert not head.state_dict()
    x = torch.randn(2, 13, dtype=dtype)
    assert torch.equal(head(x), nn.functional.linear(x, table))


def test_the_value_comes_back() -> None:
    for grid in GRIDS.names():
        q = fake_linear(5, 24, QuantScheme(bits=3, group_size=8, grid=grid), False, torch.float32).freeze()
        back = PackedLinear.from_qtensor(q).qtensor()
        assert back.scheme == q.scheme
        for name in ("codes_OI", "scale_OG", "zero_OG"):
            assert torch.equal(getattr(back, name), getattr(q, name))


@pytest.mark.parametrize("dtype", DTYPES)
def test_casting_the_model_keeps_scales_and_moves_the_rest(dtype: torch.dtype) -> None:
    scheme = QuantScheme(bits=2, group_size=8, grid="affine")
    trained = fake_linear(6, 16, scheme, True, torch.float32)
    model = nn.ModuleList(
        [PackedLinear.from_qtensor(trained.freeze(), trained.bias), PackedEmbedding.from_qtensor(trained.freeze())]
    )
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.to(dtype)
    for name, t in model.state_dict().items():
        if "weight" in name:
            assert torch.equal(t, before[name])
            assert t.dtype == before[name].dtype
    assert model[0].bias.dtype == dtype
    assert model[1](torch.tensor([1])).dtype == dtype


def test_copies_and_meta() -> None:
    scheme = QuantScheme(bits=2)
    embedding = PackedEmbedding.from_qtensor(fake_linear(6, 16, scheme, False, torch.float32).freeze())
    both = nn.ModuleList([embedding, TiedHead(embedding)])
    twin = copy.deepcopy(both)
    assert twin[1].embedding is twin[0]
    assert twin[0] is not both[0]
    with torch.device("meta"):
        empty = PackedLinear(16, 6, scheme, bias=True)
    filled = empty.to(torch.bfloat16).to_empty(device="cpu")
    assert filled.weight_scale.dtype == torch.float16
    assert filled.weight_packed.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_are_the_same_on_cuda(bits: int) -> None:
    packed = PackedLinear.from_qtensor(fake_linear(7, 45, QuantScheme(bits=bits), False, torch.float32).freeze())
    here = packed.dequantize()
    assert torch.equal(packed.to("cuda").dequantize().cpu(), here)
    assert packed.qtensor().codes_OI.is_cuda
