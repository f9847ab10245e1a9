"""MS-EDEN against the figures of its authors' notebooks, and the laws of an estimate without bias."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from upq.core.levels import E2M1
from upq.core.scales import SCALE_TYPES
from upq.core.scheme import QuantScheme
from upq.grids import search_scale
from upq.nn import ms_eden
from upq.nn.fake_quant import FakeQuantLinear
from upq.nn.ms_eden import BLOCK, TURNED, Backward, Draws, at_random, estimate, product, turn, turned


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def share(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).square().sum() / exact.square().sum()).item()


def eden(x_RK: Tensor, generator: torch.Generator) -> Tensor:
    """The estimate, turned back."""
    turn_DD = turn(generator)
    return turned(estimate(turned(x_RK, turn_DD), generator), turn_DD.t())


def stochastic(x_RK: Tensor, generator: torch.Generator) -> Tensor:
    """Plain NVFP4 with every level rounded at random: unbiased too."""
    kind, levels = SCALE_TYPES["e4m3"], torch.tensor(sorted(set(E2M1)))
    x_NS = x_RK.reshape(-1, BLOCK)
    outer = x_NS.abs().max() / (6 * 255.99)
    inner_N1 = kind.decode(kind.encode(x_NS.abs().amax(-1, keepdim=True) / 6 / outer * 17 / 16))  # nothing is clipped
    place_NS = x_NS / outer / inner_N1
    above_NS = torch.bucketize(place_NS, levels).clamp(1, len(levels) - 1)
    low_NS, high_NS = levels[above_NS - 1], levels[above_NS]
    up_NS = torch.rand(x_NS.shape, generator=generator) < (place_NS - low_NS) / (high_NS - low_NS)
    return (torch.where(up_NS, high_NS, low_NS) * inner_N1 * outer).view_as(x_RK)


def slope(each: Tensor, exact: Tensor) -> float:
    """Of the logarithm of the error of a mean over B estimates against log B, B = 1, 2, 4 … 64, by least squares."""
    sizes = [2**k for k in range(7)]
    errors = [sum(share(part.mean(0), exact) for part in each.split(size)) / (len(each) // size) for size in sizes]
    x = torch.tensor([math.log(size) for size in sizes])
    y = torch.tensor([0.5 * math.log(error) for error in errors])
    return ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()


class TestEstimate:
    def test_the_error_is_the_published_one_and_far_below_that_of_random_levels(self) -> None:
        x_RK, generator = gaussian(2048, TURNED), torch.Generator().manual_seed(1)
        ours = share(eden(x_RK, generator), x_RK)
        assert ours == pytest.approx(9.8e-3, rel=0.02)
        plain = share(stochastic(x_RK, generator), x_RK)
        assert plain == pytest.approx(23.5e-3, rel=0.1)
        assert ours < plain / 2.2

    def test_the_mean_of_estimates_nears_the_number_as_one_over_the_root_of_their_count(self) -> None:
        x_RK, generator = gaussian(64, TURNED), torch.Generator().manual_seed(2)
        each = torch.stack([eden(x_RK, generator) for _ in range(128)])
        assert slope(each, x_RK) == pytest.approx(-0.5, abs=0.05)

    def test_a_bias_of_three_hundredths_would_show(self) -> None:
        x_RK, generator = gaussian(64, TURNED), torch.Generator().manual_seed(2)
        each = 0.97 * torch.stack([eden(x_RK, generator) for _ in range(128)])
        assert slope(each, x_RK) > -0.45

    def test_the_factor_gives_back_what_rounding_has_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """<x, estimate> = <x, x> for each group, where scales are not rounded."""
        monkeypatch.setattr(ms_eden, "at_random", lambda scales, generator: scales)
        x_RK = gaussian(16, 2 * TURNED)
        found_RK = estimate(x_RK, torch.Generator())
        groups = (len(x_RK), 2, TURNED)
        torch.testing.assert_close((found_RK * x_RK).view(groups).sum(-1), x_RK.square().view(groups).sum(-1))

    def test_scales_are_e4m3_and_their_mean_is_the_scale(self) -> None:
        scales = torch.tensor([1e-3, 0.01, 0.7, 1.0, 3.3, 17.0, 255.9, 447.0])
        drawn = at_random(scales.expand(20_000, -1), torch.Generator().manual_seed(3))
        assert torch.equal(drawn.to(torch.float8_e4m3fn).float(), drawn)
        spread = drawn.std(0) / 20_000**0.5
        assert ((drawn.mean(0) - scales).abs() <= 4 * spread + 1e-6 * scales).all()
        assert (drawn[:, 3] == 1).all()  # what E4M3 has stays

    def test_a_turn_cancels(self) -> None:
        a_RK, b_CK, turn_DD = gaussian(8, 256), gaussian(4, 256, 1), turn(torch.Generator().manual_seed(4))
        torch.testing.assert_close(turn_DD @ turn_DD.t(), torch.eye(TURNED), atol=1e-6, rtol=0)
        torch.testing.assert_close(
            turned(a_RK, turn_DD) @ turned(b_CK, turn_DD).t(), a_RK @ b_CK.t(), atol=1e-4, rtol=0
        )

    @pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
    def test_rows_of_every_size_stay_finite(self, size: float) -> None:
        x_RK = gaussian(4, TURNED)
        x_RK[1] = 0
        assert estimate(x_RK * size, torch.Generator().manual_seed(0)).isfinite().all()

    def test_what_is_not_finite_is_not_hidden(self) -> None:
        x_RK = gaussian(4, TURNED)
        x_RK[2, 3] = math.inf
        assert not product(x_RK, gaussian(4, TURNED, 1), torch.Generator().manual_seed(0)).isfinite().all()


class TestLinear:
    def gradients(self, backward: Backward | None) -> tuple[Tensor, Tensor, Tensor]:
        """Output and the gradients of input and weight; 40 tokens, which are no whole block."""
        w_OI, scheme = gaussian(48, 32), QuantScheme(bits=2)
        layer = FakeQuantLinear(w_OI, search_scale(w_OI, scheme), scheme)
        layer.backward = backward
        x_TI = gaussian(40, 32, 1).requires_grad_()
        y_TO = layer(x_TI)
        y_TO.backward(gaussian(40, 48, 2))
        assert x_TI.grad is not None
        assert layer.weight.grad is not None
        return y_TO.detach(), x_TI.grad, layer.weight.grad

    def test_both_gradients_are_estimates_without_bias_of_the_plain_ones(self) -> None:
        plain, draws = self.gradients(None), Draws()
        found: list[tuple[Tensor, ...]] = []
        for step in range(128):
            draws.begin(step, 0, 0)
            found.append(self.gradients(Backward(draws, 0)))
        assert torch.equal(found[0][0], plain[0])  # the forward pass is the same
        for each, exact in zip(zip(*found, strict=True), plain, strict=True):
            if exact is not plain[0]:
                assert 1e-3 < share(each[0], exact) < 0.1
                assert slope(torch.stack(each), exact) == pytest.approx(-0.5, abs=0.05)

    def test_draws_are_a_function_of_step_micro_batch_process_and_place(self) -> None:
        def drawn(step: int, micro_batch: int, process: int, place: int) -> Tensor:
            draws = Draws()
            draws.begin(step, micro_batch, process)
            return self.gradients(Backward(draws, place))[1]

        places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
        first, again = ([drawn(*place) for place in places] for _ in range(2))
        assert all(map(torch.equal, first, again))
        assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
