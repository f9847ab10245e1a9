"""GPTQ against what it approximates nothing from: OBQ with an explicit inverse at every column, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from schemes import PLAIN, fitting
from upq.blockwise.gptq import gptq, objective
from upq.core.scheme import PER_CHANNEL, QuantScheme, to_groups
from upq.grids import GRIDS, Params, search_scale


def problem(o: int = 8, i: int = 48, *, tokens: int = 256, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights and the second moments of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x_TI = normal(tokens, i) @ (torch.eye(i, dtype=torch.float64) + 0.2 * normal(i, i))
    return normal(o, i), x_TI.T @ x_TI / tokens


def damped(h_II: Tensor, damp: float) -> Tensor:
    return h_II + damp * h_II.diagonal().mean() * torch.eye(len(h_II), dtype=h_II.dtype)


def obq(
    w_OI: Tensor,
    h_II: Tensor,
    params: Params,
    scheme: QuantScheme,
    *,
    damp: float,
    order_I: Tensor | None = None,
) -> Tensor:
    """Round the columns left to right; after each, solve least squares for those still free."""
    h_II, grid, n = damped(h_II, damp), GRIDS.get(scheme.grid), w_OI.shape[1]
    order_I = torch.arange(n) if order_I is None else order_I
    w_OI, h_II, back_I = w_OI[:, order_I], h_II[order_I][:, order_I], order_I.argsort()
    free_OI = w_OI.clone()
    for k in range(n):
        # The whole row is rounded with its own parameters, where its columns stand; of it only column k is kept.
        free_OI[:, k] = grid.fake(free_OI[:, back_I].contiguous(), params, scheme)[:, order_I[k]].double()
        if k + 1 < n:
            fixed_OI = (free_OI - w_OI)[:, : k + 1]
            inverse_II = torch.linalg.inv(h_II[k + 1 :, k + 1 :])
            free_OI[:, k + 1 :] = w_OI[:, k + 1 :] - fixed_OI @ h_II[: k + 1, k + 1 :] @ inverse_II
    return free_OI[:, back_I]


@pytest.mark.parametrize("grid", PLAIN)
class TestLaws:
    @pytest.mark.parametrize("group_size", [PER_CHANNEL, 16])
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_equals_exact_obq(self, grid: str, bits: int, group_size: int) -> None:
        """Row by row: OBQ's result, or nearest rounding where that is better."""
        scheme = QuantScheme(bits=bits, group_size=group_size, grid=grid)
        w_OI, h_II = problem()
        params = search_scale(w_OI, scheme)
        exact_OI, nearest_OI = obq(w_OI, h_II, params, scheme, damp=0.01), GRIDS.get(grid).fake(w_OI, params, scheme)
        cost_exact_O, cost_nearest_O = (objective(x, w_OI, damped(h_II, 0.01)) for x in (exact_OI, nearest_OI))
        expected_OI = torch.where((cost_exact_O < cost_nearest_O)[:, None], exact_OI, nearest_OI.double())
        assert (cost_exact_O < cost_nearest_O).float().mean() > 0.5  # the comparison is about OBQ
        found_OI = gptq(w_OI, h_II, params, scheme, damp=0.01)
        torch.testing.assert_close(found_OI, expected_OI, rtol=0, atol=1e-9)

    def test_without_correlation_it_is_nearest_rounding(self, grid: str) -> None:
        for bits in (2, 4):
            scheme, (w_OI, _) = QuantScheme(bits=bits, group_size=8, grid=grid), problem()
            params = search_scale(w_OI, scheme)
            for h_II in (torch.eye(48, dtype=torch.float64), torch.rand(48, dtype=torch.float64).add(0.1).diag()):
                nearest_OI = GRIDS.get(grid).fake(w_OI, params, scheme)
                assert torch.equal(gptq(w_OI, h_II, params, scheme), nearest_OI.double())

    @pytest.mark.parametrize("width", [44, 48])
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_never_worse_than_nearest_and_clearly_better_in_all(self, grid: str, bits: int, width: int) -> None:
        scheme, (w_OI, h_II) = QuantScheme(bits=bits, grid=grid), problem(32, width)
        params = search_scale(w_OI, scheme)
        before_O = objective(GRIDS.get(grid).fake(w_OI, params, scheme), w_OI, damped(h_II, 0.01))
        after_O = objective(gptq(w_OI, h_II, params, scheme), w_OI, damped(h_II, 0.01))
        assert (after_O <= before_O).all()
        assert after_O.sum() < 0.8 * before_O.sum()

    def test_every_weight_is_on_the_grid_it_was_given(self, grid: str) -> None:
        scheme, (w_OI, h_II) = QuantScheme(bits=3, group_size=16, grid=grid), problem()
        params = search_scale(w_OI, scheme)
        rounded_OI = gptq(w_OI.float(), h_II.float(), params, scheme)
        frozen = GRIDS.get(grid).freeze(rounded_OI, params, scheme)
        assert torch.equal(frozen.dequantize(), rounded_OI)
        steps_OGS = to_groups(rounded_OI, scheme) / frozen.scale_OG.float()[..., None] + frozen.zero_OG[..., None]
        torch.testing.assert_close(steps_OGS, steps_OGS.round(), rtol=0, atol=1e-3)

    def test_float32_finds_almost_what_float64_finds(self, grid: str) -> None:
        scheme, (w_OI, h_II) = QuantScheme(bits=3, grid=grid), problem(32)
        params = search_scale(w_OI, scheme)
        exact_O, single_O = (
            objective(gptq(w, h, params, scheme).double(), w_OI, h_II)
            for w, h in ((w_OI, h_II), (w_OI.float(), h_II.float()))
        )
        assert single_O.sum() == pytest.approx(exact_O.sum().item(), rel=0.05)


class TestOrder:
    """Columns of large inputs first, each with the parameters of the group where it stands."""

    def test_without_correlation_the_order_is_nothing(self) -> None:
        scheme, (w_OI, _) = QuantScheme(bits=2, group_size=8), problem()
        params, h_II = search_scale(w_OI, scheme), torch.rand(48, dtype=torch.float64).add(0.1).diag()
        natural, sorted_ = (gptq(w_OI, h_II, params, scheme, order=o) for o in ("natural", "activation"))
        assert torch.equal(natural, sorted_)

    @pytest.mark.parametrize("scheme", [QuantScheme(bits=3), fitting("nvfp4")], ids=lambda s: s.grid)
    def test_it_is_obq_on_permuted_columns(self, scheme: QuantScheme) -> None:
        w_OI, h_II = problem()
        params, grid = search_scale(w_OI, scheme), GRIDS.get(scheme.grid)
        order_I = h_II.diagonal().argsort(descending=True, stable=True)
        exact_OI = obq(w_OI, h_II, params, scheme, damp=0.01, order_I=order_I)
        nearest_OI = grid.fake(w_OI, params, scheme).double()
        cost_exact_O, cost_nearest_O = (objective(x, w_OI, damped(h_II, 0.01)) for x in (exact_OI, nearest_OI))
        expected_OI = torch.where((cost_exact_O < cost_nearest_O)[:, None], exact_OI, nearest_OI)
        found_OI = gptq(w_OI, h_II, params, scheme, order="activation")
        torch.testing.assert_close(found_OI, expected_OI, rtol=0, atol=1e-9)
        assert not torch.equal(found_OI, gptq(w_OI, h_II, params, scheme))


class TestDamping:
    def test_much_of_it_is_nearest_rounding(self) -> None:
        scheme, (w_OI, h_II) = QuantScheme(bits=2), problem()
        params = search_scale(w_OI, scheme)
        nearest_OI = GRIDS.get("seq").fake(w_OI, params, scheme).double()
        assert torch.equal(gptq(w_OI, h_II, params, scheme, damp=1e9), nearest_OI)
        assert not torch.equal(gptq(w_OI, h_II, params, scheme, damp=0.01), nearest_OI)

    def test_makes_up_for_too_few_tokens(self) -> None:
        """With fewer tokens than features H has no inverse of its own."""
        scheme, (w_OI, h_II) = QuantScheme(bits=2), problem(tokens=20)
        params = search_scale(w_OI, scheme)
        before_O = objective(GRIDS.get("seq").fake(w_OI, params, scheme), w_OI, h_II)
        after_O = objective(gptq(w_OI, h_II, params, scheme), w_OI, h_II)
        assert after_O.sum() < 0.6 * before_O.sum()

    def test_is_not_needed_where_nothing_is_read(self) -> None:
        scheme, (w_OI, h_II) = QuantScheme(bits=2), problem()
        params = search_scale(w_OI, scheme)
        nearest_OI = GRIDS.get("seq").fake(w_OI, params, scheme).double()
        assert torch.equal(gptq(w_OI, torch.zeros_like(h_II), params, scheme), nearest_OI)

    def test_is_a_share_of_the_mean_diagonal(self) -> None:
        """So the result does not depend on the unit of the inputs."""
        scheme, (w_OI, h_II) = QuantScheme(bits=3), problem()
        params = search_scale(w_OI, scheme)
        assert torch.equal(gptq(w_OI, h_II, params, scheme), gptq(w_OI, 2.0**12 * h_II, params, scheme))
