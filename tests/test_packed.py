"""Packed layers: through the reference kernels, what they compute is what was trained, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from pairwise import pairwise
from schemes import PLAIN, SCALAR, fitting
from upq.core.errors import UPQError
from upq.core.levels import Uniform
from upq.core.scheme import PER_CHANNEL, QTensor, QuantScheme
from upq.grids import GRIDS, search_scale
from upq.kernels import pack, unpack
from upq.nn.fake_quant import FakeQuantLinear
from upq.nn.packed import PackedEmbedding, PackedLinear, TiedHead, dense_like, pack_like

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


pytestmark = pytest.mark.usefixtures("reference")


def fake_linear(rows: int, columns: int, scheme: QuantScheme, bias: bool, dtype: torch.dtype) -> FakeQuantLinear:
    torch.manual_seed(rows * columns)
    w = torch.randn(rows, columns)
    return FakeQuantLinear(w, search_scale(w, scheme), scheme, torch.randn(rows, dtype=dtype) if bias else None)


@pairwise(
    shape=[(32, PER_CHANNEL), (45, PER_CHANNEL), (48, 16), (1, PER_CHANNEL)],
    bits=range(2, 9),
    grid=SCALAR,
    dtype=DTYPES,
)
def test_linear_equals_what_was_trained(
    shape: tuple[int, int], bits: int, grid: str, dtype: torch.dtype, device: str
) -> None:
    columns, group_size = shape
    scheme = fitting(grid, bits=bits, group_size=group_size)
    columns = columns if scheme.group_size in (PER_CHANNEL, group_size) else 3 * scheme.group_size
    trained = fake_linear(7, columns, scheme, bits % 2 == 0, dtype).to(device)
    packed = PackedLinear.from_qtensor(trained.freeze(), trained.bias)
    x = torch.randn(2, 3, columns, dtype=dtype).to(device)
    assert torch.equal(packed(x), trained(x))
    assert torch.equal(packed.dequantize(), trained.fake())
    dense = dense_like(packed, dtype)
    assert type(dense) is nn.Linear
    assert torch.equal(dense(x), packed(x))


@pairwise(grid=PLAIN, bits=[3, 4, 8], dtype=DTYPES)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "made",
    [partial(Gemma3TextScaledWordEmbedding, 11, 13, 0, 13**0.5), partial(BartScaledWordEmbedding, 11, 13, 0, 1.3)],
)
def test_the_factor_of_an_embedding_stays(made: Callable[[], nn.Embedding], dtype: torch.dtype) -> None:
    scheme, ids = QuantScheme(bits=8), torch.tensor([[1, 10, 3]])
    q = fake_linear(11, 13, scheme, False, dtype).freeze()
    before = made().to(dtype)
    before.weight = nn.Parameter(q.dequantize().to(dtype))
    packed = pack_like(before, scheme, q)
    assert torch.equal(packed(ids), before(ids))
    assert torch.equal(dense_like(packed, dtype)(ids), before(ids))
    with torch.device("meta"):  # as a model is built that waits for its file
        assert pack_like(made(), scheme).factor == packed.factor


def test_an_embedding_that_computes_more_is_refused() -> None:
    with pytest.raises(UPQError, match="class OPTLearnedPositionalEmbedding cannot be packed: it computes more"):
        pack_like(OPTLearnedPositionalEmbedding(5, 4), QuantScheme(bits=8))


# --- what is stored: the canonical layout of an artefact


def random_qtensor(rows: int, columns: int, scheme: QuantScheme, seed: int) -> QTensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    grid = GRIDS.get(scheme.grid)
    return grid.freeze(w, grid.init(w, scheme), scheme)


@pytest.mark.parametrize("grid", SCALAR)
@settings(deadline=None, max_examples=40)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 5),
    size=st.sampled_from([PER_CHANNEL, 8, 16, 24]),
    width=st.integers(1, 50),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    seed=st.integers(0, 1000),
)
def test_the_value_comes_back(grid: str, bits: int, rows: int, size: int, width: int, dtype: str, seed: int) -> None:
    scheme = fitting(grid, bits=bits, group_size=size, scale_dtype=dtype)
    columns = width if scheme.group_size == PER_CHANNEL else scheme.group_size * (1 + width % 4)
    q = random_qtensor(rows, columns, scheme, seed)
    packed = PackedLinear.from_qtensor(q)
    with torch.device("meta"):
        loaded = PackedLinear(columns, rows, scheme)
    loaded.load_state_dict(packed.state_dict(), assign=True)
    for back in (packed.qtensor(), loaded.qtensor()):
        assert back.scheme == q.scheme
        assert torch.equal(back.dequantize(), q.dequantize())
        for name in ("codes_OI", "scale_OG", *(("zero_OG",) if GRIDS.get(grid).uniform else ())):
            got, want = getattr(back, name), getattr(q, name)
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


def packed_by_definition(codes_OI: Tensor, bits: int) -> list[list[int]]:
    """The row as one big integer, least significant code first: independent of the vectorised code."""
    rows = []
    for row in codes_OI.tolist():
        stream = sum(code << (k * bits) for k, code in enumerate(row))
        rows.append(list(stream.to_bytes(-(-len(row) * bits // 8), "little")))
    return rows


@settings(deadline=None, max_examples=100)
@given(bits=st.integers(1, 8), rows=st.integers(1, 4), columns=st.integers(1, 41), seed=st.integers(0, 1000))
def test_packed_rows_are_little_endian_bit_streams(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.tolist() == packed_by_definition(codes, bits)
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "golden"),
    [
        (2, [3, 0, 1, 2, 1], [0b10_01_00_11, 0b01]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0, 5], [0b11_010_001, 0b0_101_100_0, 0b000_111_11, 0b101]),
        (4, [1, 15, 8], [0xF1, 0x08]),
    ],
)
def test_golden_bytes(bits: int, codes: list[int], golden: list[int]) -> None:
    scheme = QuantScheme(bits=bits)
    scale = torch.tensor([[0.5]], dtype=torch.float16)
    zero = torch.tensor([[(2**bits - 1) / 2]])
    q = QTensor(torch.tensor([codes], dtype=torch.uint8), scale, Uniform(zero), scheme)
    tensors = PackedLinear.from_qtensor(q).state_dict()
    assert tensors.keys() == {"weight_packed", "weight_scale"}
    assert tensors["weight_packed"].tolist() == [golden]
    assert tensors["weight_packed"].dtype == torch.uint8
    assert tensors["weight_scale"].view(torch.uint8).tolist() == [[0x00, 0x38]]


def test_affine_stores_its_zero_as_a_scale() -> None:
    tensors = PackedLinear.from_qtensor(
        random_qtensor(3, 16, QuantScheme(bits=2, group_size=8, grid="affine"), 0)
    ).state_dict()
    assert tensors["weight_zero"].shape == (3, 2)
    assert tensors["weight_zero"].dtype == torch.float16


def test_a_zero_that_the_file_cannot_hold_is_an_error() -> None:
    q = random_qtensor(2, 8, QuantScheme(bits=2), 0)
    with pytest.raises(UPQError, match="it stores other levels; use its freeze"):
        PackedLinear.from_qtensor(QTensor(q.codes_OI, q.scale_OG, Uniform(q.zero_OG + 0.5), q.scheme))


# --- as a module of a model


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
