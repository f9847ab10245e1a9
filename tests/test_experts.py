"""Tensors of experts: trained and packed, they multiply as the quantised tensor does in the module's own forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from upq import kernels
from upq.core.scheme import QuantScheme
from upq.grids import GRIDS, search_scale
from upq.model.experts import loop
from upq.model.layout import block_list
from upq.model.matrices import Matrix, matrices, place
from upq.nn.experts import PackedExperts, TrainedExperts
from upq.nn.fake_quant import Solution
from zoo import random_model

# The orders in which transformers stores experts: (E, O, I); (E, I, O) with rows that alternate and biases; by `bmm`.
KINDS = ("qwen3_moe", "gpt_oss", "llama4_text", "jetmoe", "nemotron_h")
SCHEMES = (QuantScheme(bits=2), QuantScheme(bits=2, group_size=8, grid="affine"))


def block_of_experts(kind: str) -> tuple[nn.Module, list[Matrix]]:
    for block in block_list(random_model(kind)):
        if experts := [matrix for matrix in matrices(block) if matrix.experts]:
            return block, experts
    raise AssertionError(kind)


def solved(block: nn.Module, matrix: Matrix, scheme: QuantScheme) -> Solution:
    weight = matrix.read(block).clone()
    return Solution(weight, search_scale(weight, scheme), scheme)


def forward(block: nn.Module, matrix: Matrix, x_TH: Tensor) -> Tensor:
    """Of the module that holds the router and the experts."""
    path = matrix.module.rpartition(".")[0] or matrix.module
    out: Any = block.get_submodule(path)(x_TH[None])
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.grid)
@pytest.mark.parametrize("kind", KINDS)
def test_trained_and_packed_experts_are_the_quantised_tensor(kind: str, scheme: QuantScheme) -> None:
    block, experts = block_of_experts(kind)
    if kind == "jetmoe":
        experts = [matrix for matrix in experts if matrix.name.startswith("mlp.")]
    x_TH = torch.randn(7, experts[0].inputs, generator=torch.Generator().manual_seed(1))
    plain, trained, packed = (copy.deepcopy(block) for _ in range(3))
    leaves: list[tuple[Tensor, TrainedExperts]] = []
    for matrix in experts:
        solution = solved(block, matrix, scheme)
        weight = GRIDS.get(scheme.grid).fake(solution.latent_OI, solution.params, scheme)
        parameter = plain.get_parameter(matrix.parameter).requires_grad_()
        parameter.data = matrix.shaped(weight).clone()
        loop(plain.get_submodule(matrix.module))
        layer = TrainedExperts(solution.layer(None, torch.device("cpu")), matrix)
        place(trained, matrix, layer)
        place(packed, matrix, PackedExperts.from_qtensor(solution.qtensor(), matrix))
        leaves.append((parameter, layer))
    expected, found = forward(plain, experts[0], x_TH), forward(trained, experts[0], x_TH)
    assert torch.equal(expected, found)
    with torch.no_grad(), kernels.computing("reference"):
        assert torch.equal(forward(packed, experts[0], x_TH), expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    for (parameter, layer), matrix in zip(leaves, experts, strict=True):
        # The gradient of the quantised weight, handed on through the grid.
        latent = layer.layer.weight.detach().requires_grad_()
        params = {key: value.detach().requires_grad_() for key, value in layer.layer.grid_params.items()}
        assert parameter.grad is not None
        GRIDS.get(scheme.grid).fake(latent, params, scheme).backward(matrix.flat(parameter.grad))
        torch.testing.assert_close(layer.layer.weight.grad, latent.grad, rtol=1e-5, atol=1e-7)
        for key, value in params.items():
            torch.testing.assert_close(layer.layer.grid_params[key].grad, value.grad, rtol=1e-4, atol=1e-6)


def test_gradients_of_two_passes_add_up() -> None:
    """What learns is cut by expert once, and both passes go through the same cut."""
    block, experts = block_of_experts("qwen3_moe")
    layers = []
    for matrix in experts:
        layer = TrainedExperts(solved(block, matrix, SCHEMES[0]).layer(None, torch.device("cpu")), matrix)
        place(block, matrix, layer)
        layers.append(layer)
    x_TH = torch.randn(5, experts[0].inputs, generator=torch.Generator().manual_seed(2))
    forward(block, experts[0], x_TH).sum().backward()
    once = [layer.layer.weight.grad.clone() for layer in layers]
    forward(block, experts[0], x_TH).sum().backward()
    for layer, gradient in zip(layers, once, strict=True):
        torch.testing.assert_close(layer.layer.weight.grad, 2 * gradient)


def test_packed_experts_run_through_the_compiled_kernels() -> None:
    block, experts = block_of_experts("gpt_oss")
    for matrix in experts:
        place(block, matrix, PackedExperts.from_qtensor(solved(block, matrix, SCHEMES[0]).qtensor(), matrix))
    x_TH = torch.randn(7, experts[0].inputs, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with kernels.computing("reference"):
            exact = forward(block, experts[0], x_TH)
        with kernels.computing("w2a16"):
            torch.testing.assert_close(forward(block, experts[0], x_TH), exact, rtol=1e-4, atol=1e-5)
