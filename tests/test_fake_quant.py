"""The layer that trains: its products and gradients against the plain form, and what it keeps between the passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pairwise import pairwise
from schemes import SCALAR, fitting
from upq.core.scheme import PER_CHANNEL
from upq.grids import search_scale
from upq.nn.fake_quant import FakeQuantLinear

ROWS, COLUMNS = 20, 96


def make(grid: str = "seq", *, group_size: int = PER_CHANNEL, bias: bool = False) -> FakeQuantLinear:
    torch.manual_seed(0)
    scheme = fitting(grid, group_size=group_size)
    weight_OI = 0.3 * torch.randn(ROWS, COLUMNS)
    return FakeQuantLinear(weight_OI, search_scale(weight_OI, scheme), scheme, torch.randn(ROWS) if bias else None)


def plain(layer: FakeQuantLinear, x: Tensor) -> Tensor:
    return F.linear(x, layer.fake().to(x.dtype), layer.bias)


def gradients(
    run: Callable[[FakeQuantLinear, Tensor], Tensor], layer: FakeQuantLinear, x: Tensor, *, autocast: bool = False
) -> dict[str, Tensor]:
    """The output, and the gradients of x and of all that learns, for a loss that weighs every output differently."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = run(layer, x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    assert x.grad is not None
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pairwise(
    grid=SCALAR,
    group_size=[PER_CHANNEL, 8, 24],
    bias=[False, True],
    shape=[(7, COLUMNS), (3, 5, COLUMNS)],
    dtype=[torch.float32, torch.bfloat16],
    autocast=[False, True],
)
def test_gradients_are_those_of_the_plain_form(
    grid: str, group_size: int, bias: bool, shape: tuple[int, ...], dtype: torch.dtype, autocast: bool
) -> None:
    layer = make(grid, group_size=group_size, bias=bias)
    if bias and not autocast:
        layer.bias = layer.bias.to(dtype) if layer.bias is not None else None
    x = torch.randn(shape, dtype=dtype)
    expected = gradients(plain, layer, x, autocast=autocast)
    assert {"y", "x", "weight"} <= expected.keys()
    assert_same(gradients(FakeQuantLinear.__call__, layer, x, autocast=autocast), expected)


def test_a_transposed_input_makes_no_difference() -> None:
    layer, x = make(bias=True), torch.randn(COLUMNS, 5, 3).permute(2, 1, 0)
    expected = gradients(lambda layer, x: plain(layer, x.contiguous()), layer, x)
    assert_same(gradients(FakeQuantLinear.__call__, layer, x), expected)


@pytest.mark.parametrize("grid", SCALAR)
def test_used_twice_and_under_checkpointing(grid: str) -> None:
    """Both uses of a layer count, and a pass that is run again gives what the first one gave."""
    layer, x = make(grid), torch.randn(7, COLUMNS)
    pad = COLUMNS - ROWS

    def twice(product: Callable[[FakeQuantLinear, Tensor], Tensor]) -> Callable[[FakeQuantLinear, Tensor], Tensor]:
        return lambda layer, x: product(layer, F.pad(product(layer, x).tanh(), (0, pad)))

    expected = gradients(twice(plain), layer, x)
    assert_same(gradients(twice(FakeQuantLinear.__call__), layer, x), expected)
    again = twice(FakeQuantLinear.__call__)
    found = gradients(lambda layer, x: checkpoint(again, layer, x, use_reentrant=False), layer, x)
    assert_same(found, expected)


def test_what_does_not_learn_gets_no_gradient() -> None:
    layer, x = make("affine"), torch.randn(7, COLUMNS)
    whole = gradients(FakeQuantLinear.__call__, layer, x)
    for fixed in (["weight"], ["grid_params.zero"], [name for name, _ in layer.named_parameters()]):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name not in fixed)
        expected = {name: gradient for name, gradient in whole.items() if name not in fixed}
        assert_same(gradients(FakeQuantLinear.__call__, layer, x), expected)
    layer.requires_grad_()
    layer(x).sum().backward()  # tokens, not activations, come before the first block: x itself needs none
    assert layer.weight.grad is not None


@pytest.mark.parametrize("grid", SCALAR)
def test_nothing_of_the_size_of_the_weight_is_kept(grid: str) -> None:
    """Between the passes: the inputs and what learns, which is in memory anyway."""
    stack, x = nn.Sequential(*(make(grid) for _ in range(3))), torch.randn(7, COLUMNS, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in stack.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [layer(x) for layer in stack]  # held, so that no address is used twice
    assert sum(kept.values()) == x.nbytes  # once, though three layers read it
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs += [plain(layer, x) for layer in stack]  # what the law is about
    assert sum(kept.values()) >= x.nbytes + 3 * ROWS * COLUMNS * 4
