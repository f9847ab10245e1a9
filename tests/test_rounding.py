"""Laws of learned rounding, on any grid of evenly spaced levels."""

from __future__ import annotations

import pytest
import torch

from schemes import PLAIN
from upq.blockwise._rounding import (
    SOFT,
    Learned,
    _latent,
    bracket,
    exponent,
    harden,
    penalty_of,
    share_up,
    soft,
    start_of,
)
from upq.core.scheme import QuantScheme, to_groups
from upq.grids import GRIDS, search_scale

SCHEMES = [QuantScheme(bits=bits, grid=grid, group_size=16) for grid in PLAIN for bits in (2, 4)]


def weights(rows: int = 6, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.grid}-{s.bits}")
class TestEveryGrid:
    def test_the_soft_weight_is_the_weight_at_the_start(self, scheme: QuantScheme) -> None:
        """Within 1e-6 of a step, and at the last level for weights beyond it."""
        w_OI = weights()
        params, grid = search_scale(w_OI, scheme), GRIDS.get(scheme.grid)
        scale_OG, zero_OG = grid.scale_and_zero(params, scheme)
        found = bracket(w_OI, params, scheme)
        soft_OI = soft(start_of(found), found.lower_OI, scale_OG, zero_OG)
        steps = to_groups(soft_OI, scheme) / scale_OG[..., None] + zero_OG[..., None]
        expected = to_groups(w_OI, scheme) / scale_OG[..., None] + zero_OG[..., None]
        assert (steps - expected.clamp(0, scheme.levels - 1)).abs().max() < 2e-6 * scheme.levels
        assert (expected > scheme.levels - 1).any()

    def test_hard_at_its_start_is_nearest_rounding(self, scheme: QuantScheme) -> None:
        """Bit for bit, ties included."""
        w_OI = weights()
        params, grid = search_scale(w_OI, scheme), GRIDS.get(scheme.grid)
        scale_OG, zero_OG = grid.scale_and_zero(params, scheme)
        half = (torch.arange(16) % scheme.levels + 0.5 - zero_OG[0, 0]) * scale_OG[0, 0]
        w_OI[0, :16] = half.detach()
        found = bracket(w_OI, params, scheme)
        v_OI = start_of(found)
        nearest = grid.freeze(w_OI, params, scheme)
        assert torch.equal(found.lower_OI + (v_OI >= 0), nearest.codes_OI)
        again = grid.freeze(_latent(v_OI, found.lower_OI, params, scheme), params, scheme)
        assert torch.equal(again.codes_OI, nearest.codes_OI)
        assert torch.equal(again.dequantize(), nearest.dequantize())

    def test_a_latent_rounds_to_what_was_learned_and_keeps_its_bracket(self, scheme: QuantScheme) -> None:
        w_OI = weights()
        params = search_scale(w_OI, scheme)
        found = bracket(w_OI, params, scheme)
        v_OI = 3 * torch.randn(w_OI.shape, generator=torch.Generator().manual_seed(2))
        v_OI[0] = torch.inf
        v_OI[1] = -torch.inf
        latent_OI = _latent(v_OI, found.lower_OI, params, scheme)
        codes_OI = GRIDS.get(scheme.grid).freeze(latent_OI, params, scheme).codes_OI
        assert torch.equal(codes_OI, found.lower_OI + (v_OI >= 0))
        assert torch.equal(bracket(latent_OI, params, scheme).lower_OI, found.lower_OI)


def test_the_soft_weight_has_the_gradient_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    v_OI = torch.randn(3, 8, generator=generator, dtype=torch.double).requires_grad_()
    scale_OG = torch.rand(3, 2, generator=generator, dtype=torch.double).requires_grad_()
    lower_OI = torch.randint(0, 3, (3, 8), generator=generator).to(torch.uint8)
    zero_OG = torch.full((3, 2), 1.5, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda v, s: soft(v, lower_OI, s, zero_OG), (v_OI, scale_OG))


def test_the_penalty_is_its_formula_and_nothing_on_a_level() -> None:
    """Equation 16 of BRECQ, in float64."""
    v = torch.linspace(-4, 4, 41, dtype=torch.double)
    h = (1.2 / (1 + torch.exp(-v)) - 0.1).clip(0, 1)
    for beta in (20.0, 7.5, 2.0):
        assert penalty_of(v, beta).item() == pytest.approx((1 - (2 * h - 1).abs() ** beta).sum().item(), rel=1e-12)
    assert penalty_of(torch.tensor([5.0, -5.0, torch.inf, -torch.inf]), 2.0) == 0


def test_beta_waits_and_then_falls_in_a_line() -> None:
    settings = {"warmup": 0.2, "start": 20.0, "end": 2.0}
    assert exponent(0.19, **settings) is None
    assert [exponent(done, **settings) for done in (0.2, 0.6, 1.0)] == pytest.approx([20, 11, 2])


def test_hardened_weights_only_grow_in_number_and_few_are_left() -> None:
    v, moved = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)), torch.Generator().manual_seed(4)
    before = torch.zeros_like(v, dtype=torch.bool)
    for share in SOFT:
        v = v + 0.3 * torch.randn(v.shape, generator=moved)  # as training does
        now = harden(v, share)
        assert (now | ~before).all()
        assert (~now).double().mean() == pytest.approx(share, abs=2 / v.numel())
        v[now] = torch.where(v >= 0, torch.inf, -torch.inf)[now]
        before = now
    assert (~before).double().mean() < 0.01
    assert set(share_up(v[before]).tolist()) == {0.0, 1.0}


def test_low_rank_of_full_rank_learns_as_the_variable_itself() -> None:
    """With B the identity, A has the gradient that V has."""
    v_OI, target_OI = weights(5, 8), weights(5, 8).flip(0)
    a_OI = torch.zeros(5, 8, requires_grad=True)
    full = v_OI.clone().requires_grad_()
    for each in (Learned(v_OI, (a_OI, torch.eye(8))), Learned(full)):
        (share_up(each.v()) - target_OI).square().sum().backward()
    assert torch.equal(a_OI.grad, full.grad)
