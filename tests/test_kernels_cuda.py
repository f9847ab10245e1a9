"""Products on a GPU: which kernels they go to, what is refused and how codes lie in memory. The laws of the products
themselves are cuda_laws.py's, which has to run in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from upq import kernels
from upq.core.errors import UPQError
from upq.core.levels import Uniform
from upq.core.scheme import QTensor, QuantScheme
from upq.kernels import cuda, reference
from upq.kernels.weight import Weight
from upq.nn.packed import PackedEmbedding, PackedLinear, TiedHead

TESTS = Path(__file__).parent
needs_gemlite = pytest.mark.skipif(find_spec("gemlite") is None, reason="gemlite is not installed (extra cuda)")
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"), needs_gemlite]


@pytest.fixture(autouse=True)
def as_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No choice left over from another test or the environment."""
    monkeypatch.delenv("UPQ_KERNELS", raising=False)
    kernels.set_compute(None)
    yield
    kernels.set_compute(None)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("interpreter", marks=[needs_gemlite, pytest.mark.nightly]),
        pytest.param("gpu", marks=ON_GPU),
    ],
)
def test_laws_of_products(where: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if where == "interpreter":
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "cuda_laws.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# --- choosing ------------------------------------------------------------------------------------------------------


def test_the_choice_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.compute() == kernels.compute("cpu") == "w2a8"
    assert kernels.compute("cuda") == "w2a16"
    assert kernels.compute("mps") == "reference"
    monkeypatch.setenv("UPQ_KERNELS", "reference")
    kernels.set_compute(None)
    assert kernels.compute("cuda") == "reference"
    with kernels.computing("w2a16"):
        assert kernels.compute("cuda") == kernels.compute("cpu") == "w2a16"
    monkeypatch.setenv("UPQ_KERNELS", "w2a8")
    kernels.set_compute(None)
    with pytest.raises(UPQError, match=r"w2a8 run on the CPU alone; on CUDA choose w2a16 .* or reference"):
        kernels.compute("cuda")
    assert kernels.compute("mps") == "reference"
    monkeypatch.setenv("UPQ_KERNELS", "fast")
    kernels.set_compute(None)
    with pytest.raises(UPQError, match="UPQ_KERNELS: unknown kernels 'fast'"):
        kernels.compute("cuda")


def test_products_on_a_gpu_go_to_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [weight(8, 32), weight(4, 32)]
    x: Any = SimpleNamespace(device=torch.device("cuda", 1), is_cpu=False)
    seen: list[Any] = []
    monkeypatch.setattr(cuda, "linears", lambda *given: seen.append(given) or ["y"])
    assert kernels.linears(x, weights) == ["y"]
    assert seen == [(x, [w.cuda_matrix() for w in weights], [None, None])]
    monkeypatch.setattr(reference, "linear", lambda *_, **__: "reference")
    with kernels.computing("reference"):
        assert kernels.linears(x, weights) == ["reference", "reference"]
    assert len(seen) == 1


@pytest.mark.parametrize("why", ["No module named", "Failed to find C compiler"])
def test_without_gemlite_nothing_falls_back(why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gemlite.py").write_text("import nothing" if "module" in why else f"raise RuntimeError({why!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gemlite", raising=False)
    cuda.library.cache_clear()
    with pytest.raises(UPQError, match=rf"are not there \({why}.*'upq\[cuda\]'.* UPQ_KERNELS=reference"):
        cuda.linears(torch.ones(1, 32).half(), [weight(4, 32).cuda_matrix()], [None])


@pytest.mark.parametrize(
    ("bits", "columns", "groups", "what"),
    [
        (3, 64, 1, "64 columns at 3 bits in groups of 64"),
        (2, 48, 1, "48 columns at 2 bits in groups of 48"),
        (2, 64, 4, "64 columns at 2 bits in groups of 16"),
        (2, 192, 2, "192 columns at 2 bits in groups of 96"),
    ],
)
def test_what_gemlite_cannot_hold_is_refused(bits: int, columns: int, groups: int, what: str) -> None:
    with pytest.raises(UPQError, match=f"the CUDA kernels hold .*, not {what}: UPQ_KERNELS=reference"):
        weight(4, columns, groups, bits=bits).cuda_matrix()


def test_codes_beyond_32_bits_are_refused() -> None:
    """Which would be added to wrong addresses."""
    rows, columns = 2**20, 2**13
    codes = torch.zeros(1, 1, dtype=torch.uint8).expand(rows, columns // 4)
    with pytest.raises(UPQError, match="less than 2 GiB of codes, not 1048576 rows: UPQ_KERNELS=reference"):
        cuda.pack(codes, torch.ones(1, 1).half().expand(rows, 1), 1.5, bits=2, in_features=columns)


# --- in memory -----------------------------------------------------------------------------------------------------


def weight(rows: int, columns: int, groups: int = 1, *, bits: int = 2, zeros: bool = False) -> Weight:
    g = torch.Generator().manual_seed(0)
    codes_OI = torch.randint(1 << bits, (rows, columns), generator=g).to(torch.uint8)
    scale_OG = torch.rand(rows, groups, generator=g).half()
    zero: Tensor | float = 1.5
    if zeros:
        zero = torch.randint(1 << bits, (rows, groups), generator=g).half()
    return Weight(reference.pack(codes_OI, bits), scale_OG, zero, bits=bits, in_features=columns)


@pytest.mark.parametrize("bits", cuda.BITS)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_codes_are_in_memory_once_and_stay_what_they_are(groups: int, zeros: bool, bits: int) -> None:
    held = weight(6, 128, groups, bits=bits, zeros=zeros)
    codes_OB = held.packed_OB.clone()
    matrix = held.cuda_matrix()
    assert held.cuda_matrix() is matrix  # rearranged once
    assert matrix.codes_BO.is_contiguous()
    assert matrix.codes_BO.data_ptr() == held.packed_OB.data_ptr()
    assert torch.equal(held.packed_OB, codes_OB)
    assert torch.equal(matrix.codes_BO.T, codes_OB)
    assert torch.equal(matrix.scale_GO.T, held.scale_OG.float())
    zero_OG = held.zero if isinstance(held.zero, Tensor) else torch.tensor([[held.zero]])
    assert torch.equal(matrix.zero.T if zeros else matrix.zero[None], zero_OG.float())
    assert matrix.nbytes == codes_OB.numel() + 4 * (6 * groups * (1 + zeros) + (not zeros))
    assert held.is_of(held.packed_OB, held.scale_OG, held.zero)
    again = Weight(held.packed_OB, held.scale_OG, held.zero, bits=bits, in_features=128).cuda_matrix()
    assert again.codes_BO.data_ptr() == matrix.codes_BO.data_ptr()  # they lie so already


def layer_and_table() -> tuple[PackedLinear, PackedEmbedding]:
    scheme = QuantScheme(bits=2, group_size=32, grid="affine")
    g = torch.Generator().manual_seed(0)
    zeros = torch.randint(4, (6, 2), generator=g).float()
    codes = torch.randint(4, (6, 64), generator=g).to(torch.uint8)
    q = QTensor(codes, (torch.rand(6, 2, generator=g) + 0.1).half(), Uniform(zeros), scheme)
    return PackedLinear.from_qtensor(q, torch.randn(6, generator=g)), PackedEmbedding.from_qtensor(q)


def test_a_layer_is_the_same_after_its_codes_were_rearranged() -> None:
    layer, table = layer_and_table()
    x, ids = torch.randn(3, 64), torch.tensor([5, 0, 5])
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    outputs = [layer(x), table(ids), TiedHead(table)(x)]
    for module in (layer, table):
        module.kernel_weight().cuda_matrix()
        assert not module.weight_packed.is_contiguous()
    after = layer.state_dict()
    assert list(after) == list(before)
    for name, t in after.items():
        assert torch.equal(t, before[name])
        assert t.is_contiguous()  # as a file wants it
    for computed, expected in zip([layer(x), table(ids), TiedHead(table)(x)], outputs, strict=True):
        assert torch.equal(computed, expected)
    assert torch.equal(PackedLinear.from_qtensor(layer.qtensor()).weight_packed, before["weight_packed"])


def test_other_codes_are_noticed() -> None:
    layer, _ = layer_and_table()
    other = {name: t.clone() for name, t in layer.state_dict().items()}
    other["weight_packed"] ^= 255
    held = layer.kernel_weight()
    first = held.cuda_matrix()
    assert layer.kernel_weight() is held
    layer.load_state_dict(other)  # written into the buffers
    assert layer.kernel_weight() is not held
    assert torch.equal(layer.kernel_weight().cuda_matrix().codes_BO.T, other["weight_packed"])
    layer.weight_scale *= 2
    assert torch.equal(layer.kernel_weight().cuda_matrix().scale_GO, 2 * first.scale_GO)


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_inference_mode(made: bool, used: bool) -> None:
    with torch.inference_mode(made):
        layer, _ = layer_and_table()
        codes_OB = layer.weight_packed.clone()
    with torch.inference_mode(used):
        held = layer.kernel_weight()
        held.cuda_matrix()
        assert layer.kernel_weight() is held
    assert layer.kernel_weight() is held
    assert layer.weight_packed.is_inference() is made
    assert torch.equal(layer.weight_packed, codes_OB)


# --- on a GPU ------------------------------------------------------------------------------------------------------


def on_gpu(test: Any) -> Any:
    for mark in ON_GPU:
        test = mark(test)
    return test


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_on_a_gpu(dtype: torch.dtype) -> None:
    layer, table = layer_and_table()
    exact_OI, bias_O = layer.dequantize().double(), layer.bias.detach().to(dtype).double()
    x = torch.randn(2, 3, 64).to(dtype)
    expected = x.double() @ exact_OI.T
    layer, head = layer.to("cuda", dtype), TiedHead(table.to("cuda", dtype))
    with torch.no_grad():
        for y, right in ((layer(x.cuda()), expected + bias_O), (head(x.cuda()), expected)):
            assert y.dtype == dtype
            assert float((y.cpu().double() - right).norm() / right.norm()) <= torch.finfo(dtype).eps / 2


@on_gpu
def test_memory_on_a_gpu_is_the_codes_once() -> None:
    rows, columns = 4096, 4096
    scheme = QuantScheme(bits=2)
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    q = QTensor(codes, torch.ones(rows, 1).half(), Uniform(torch.full((rows, 1), 1.5)), scheme)
    layer = PackedLinear.from_qtensor(q).to("cuda")
    x = torch.ones(1, columns, dtype=torch.float16, device="cuda")
    before = torch.cuda.memory_allocated()
    layer(x)
    assert torch.cuda.memory_allocated() - before <= 4 * rows + 2**16  # scales in float32; codes are 4 MiB
