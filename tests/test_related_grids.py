"""FP6, R2Q, DGQ, RaZeR and SplitQuantV2 against their papers' formulas, and what others have computed of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from schemes import fitting
from upq.core.levels import E2M1, E3M2, Table
from upq.core.scheme import QTensor, QuantScheme, to_groups
from upq.grids import GRIDS, Params, search_scale
from upq.grids.r2q import greedy
from upq.grids.razer import SPECIALS
from upq.grids.splitquant import _boundaries
from upq.nn.packed import PackedLinear


def gaussian(rows: int = 16, columns: int = 4096) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def error(w_OI: Tensor, params: Params, scheme: QuantScheme) -> float:
    rounded_OI = GRIDS.get(scheme.grid).fake(w_OI, params, scheme)
    return ((rounded_OI - w_OI).square().sum() / w_OI.square().sum()).item()


def frozen(w_OI: Tensor, scheme: QuantScheme) -> QTensor:
    return GRIDS.get(scheme.grid).freeze(w_OI, search_scale(w_OI, scheme), scheme)


class TestFp6:
    def test_the_bias_shift_decodes_every_code(self) -> None:
        """Sign to bit 15, the other five bits to bits 8 to 12 of a float16, times 2^12: subnormals too."""
        codes = torch.arange(64, dtype=torch.int32)
        bits = ((codes >> 5 << 15) | ((codes & 31) << 8)).to(torch.uint16)
        shifted = bits.view(torch.float16).float() * 2.0**12
        assert torch.equal(shifted, torch.tensor(E3M2))

    def test_errors_on_gaussian_rows(self) -> None:
        w_OI, scheme = gaussian(64), fitting("fp6")
        ranged = error(w_OI, GRIDS.get("fp6").init(w_OI, scheme), scheme)
        searched = error(w_OI, search_scale(w_OI, scheme), scheme)
        assert ranged == pytest.approx(0.00279, rel=0.01)
        assert searched < ranged


class TestR2q:
    def test_errors_on_gaussian_weights(self) -> None:
        w_OI, scheme = gaussian(64), fitting("r2q", group_size=128)
        assert error(w_OI, greedy(w_OI, scheme), scheme) == pytest.approx(0.1288, rel=0.01)
        assert error(w_OI, search_scale(w_OI, scheme), scheme) == pytest.approx(0.1142, rel=0.01)

    @pytest.mark.parametrize("group_size", [-1, 128])
    def test_no_group_is_worse_than_in_seq(self, group_size: int) -> None:
        w_OI, scheme = gaussian(8, 512) ** 3, fitting("r2q", group_size=group_size)
        seq = replace(scheme, grid="seq")
        ours, theirs = (to_groups((frozen(w_OI, s).dequantize() - w_OI).square(), s).sum(-1) for s in (scheme, seq))
        assert (ours <= theirs).all()
        assert ours.sum() < 0.97 * theirs.sum()

    def test_greedy_is_the_best_single_scale_first(self) -> None:
        w_OI, scheme = gaussian(4, 64), fitting("r2q")
        a1_O1 = greedy(w_OI, scheme)["log_scale"].exp()
        torch.testing.assert_close(a1_O1[:, 0], w_OI.abs().mean(-1))

        def left(a_O1: Tensor) -> Tensor:
            return (w_OI.abs() - a_O1).square().sum()

        assert all(left(a1_O1) < left(a1_O1 * factor) for factor in (0.9, 0.99, 1.01, 1.1))

    def test_twice_the_second_scale_is_seq(self) -> None:
        """The same codes, the same bytes of scales, the same weight."""
        w_OI, scheme = gaussian(4, 64), fitting("r2q", group_size=16)
        seq = replace(scheme, grid="seq")
        theirs = frozen(w_OI, seq)
        params = {"log_scale": theirs.scales().log(), "ratio": torch.full_like(theirs.scales(), 0.5)}
        ours = GRIDS.get("r2q").freeze(w_OI, params, scheme)
        assert torch.equal(ours.codes_OI, theirs.codes_OI)
        assert torch.equal(ours.scale_OG, theirs.scale_OG)
        assert torch.equal(ours.dequantize(), theirs.dequantize())


class TestDgq:
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_every_product_of_scale_and_code_fits_an_int8(self, bits: int) -> None:
        scheme = fitting("dgq", bits=bits, group_size=16)
        for seed in range(3):
            w_OI = torch.randn(8, 128, generator=torch.Generator().manual_seed(seed)) ** 3
            for params in (GRIDS.get("dgq").init(w_OI, scheme), search_scale(w_OI, scheme)):
                q = GRIDS.get("dgq").freeze(w_OI, params, scheme)
                whole_OGS = (to_groups(q.codes_OI, scheme).int() - q.zero_OG.int()[..., None]) * q.scale_OG.int()[
                    ..., None
                ]
                assert whole_OGS.abs().max() <= 127
                assert q.outer_O1 is not None
                assert torch.equal(whole_OGS.view(8, 128) * q.outer_O1, q.dequantize())

    def test_a_row_is_one_sum_of_integers(self) -> None:
        """int32 sums of int8 products, and one factor: what the dequantised weight gives in exact arithmetic."""
        q = frozen(gaussian(8, 256), fitting("dgq", group_size=64))
        assert q.outer_O1 is not None
        whole_OI = (q.dequantize() / q.outer_O1).int()
        x_I = torch.randint(-127, 128, (256,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
        sums = (whole_OI * x_I).sum(-1, dtype=torch.int32)
        exact = (q.dequantize().double() * x_I.double()).sum(-1)
        assert torch.equal(sums.double() * q.outer_O1[:, 0].double(), exact)

    def test_integer_scales_cost_nothing(self) -> None:
        w_OI, scheme = gaussian(64), fitting("dgq", bits=4, group_size=128)
        affine = QuantScheme(bits=4, group_size=128, grid="affine")
        ours = error(w_OI, search_scale(w_OI, scheme), scheme)
        assert ours < 0.0101
        assert ours < 1.03 * error(w_OI, search_scale(w_OI, affine), affine)


class TestRazer:
    def test_errors_on_gaussian_weights(self) -> None:
        w_OI, scheme = gaussian(64), fitting("razer")
        assert error(w_OI, GRIDS.get("razer").init(w_OI, scheme), scheme) == pytest.approx(0.00566, rel=0.01)

    def test_no_group_is_worse_than_fp4_on_the_same_scales(self) -> None:
        w_OI, scheme = gaussian(8, 256) ** 3, fitting("razer")
        grid = GRIDS.get("razer").settled([w_OI])
        q = frozen(w_OI, scheme)
        plain = grid.init(w_OI, scheme)  # the scale of E2M1's own range, whatever the choice there
        kind, outer_O1 = scheme.scale, plain["outer"]
        peak_OG = to_groups(w_OI, scheme).abs().amax(-1)
        scale_OG = kind.decode(kind.encode(peak_OG / 6 / outer_O1)) * outer_O1
        levels = torch.tensor(sorted(set(E2M1)))
        x_OGS = to_groups(w_OI, scheme) / scale_OG[..., None]
        fp4_OGS = (x_OGS[..., None] - levels).abs().amin(-1) * scale_OG[..., None]
        ours_OG = to_groups((q.dequantize() - w_OI).square(), scheme).sum(-1)
        assert (ours_OG <= fp4_OGS.square().sum(-1) * (1 + 1e-6)).all()

    def test_the_choice_comes_back_from_the_scales_byte(self) -> None:
        q = frozen(gaussian(16, 512), fitting("razer"))
        assert isinstance(q.levels, Table)
        assert q.levels.choice_OG is not None
        assert q.levels.choice_OG.unique().tolist() == [0, 1, 2, 3]
        assert torch.equal(q.scale_OG >> 6, q.levels.choice_OG)
        back = PackedLinear.from_qtensor(q).qtensor()
        assert torch.equal(back.dequantize(), q.dequantize())
        for choice, special in enumerate(SPECIALS):
            there = (q.levels.choice_OG == choice)[..., None] & (to_groups(q.codes_OI, q.scheme) == 8)
            found = to_groups(q.dequantize(), q.scheme) / q.scales()[..., None]
            assert there.any()
            assert (found[there] == special).all()


class TestSplitQuant:
    """A matrix as three, each with one scale: what the levels of each are, and what they buy."""

    def test_errors_on_gaussian_weights(self) -> None:
        """As published, a weight takes the levels of its own cluster alone; one scale a tensor has eight times that."""
        w_OI, scheme = gaussian(64), fitting("splitquant")
        params = GRIDS.get("splitquant").init(w_OI, scheme)
        assert error(w_OI, params, scheme) == pytest.approx(0.00396, rel=0.01)
        published = sum(((part - w).square().sum().item()) for part, w in published_parts(w_OI, scheme))
        assert published / w_OI.square().sum().item() == pytest.approx(0.00435, rel=0.01)
        step = w_OI.abs().max() / 7.5
        plain = (w_OI / step).round().clamp(-8, 7) * step
        assert ((plain - w_OI).square().sum() / w_OI.square().sum()).item() == pytest.approx(0.0321, rel=0.01)

    @pytest.mark.parametrize("power", [1, 3])
    def test_three_scales_are_better_than_one(self, power: int) -> None:
        w_OI, scheme = gaussian(16, 512) ** power, fitting("splitquant")
        one = QuantScheme(bits=4, grid="affine")
        line, plain = w_OI.view(1, -1), GRIDS.get("affine")
        split = error(w_OI, search_scale(w_OI, scheme), scheme)
        assert split < error(line, plain.init(line, one), one) / 4

    @pytest.mark.parametrize("power", [1, 3])
    def test_the_boundaries_are_those_of_k_means(self, power: int) -> None:
        """Lloyd on the numbers themselves stays where the histogram's has ended, but for the width of a bin."""
        w = (gaussian(16, 512) ** power).flatten().double()
        first, second = _boundaries(w[None], w.min().item(), w.max().item())
        parts = torch.bucketize(w, torch.tensor([first, second], dtype=torch.float64))
        centres = torch.stack([w[parts == part].mean() for part in range(3)])
        bins = (w.max() - w.min()).item() / 4096
        assert ((centres[1:] + centres[:-1]) / 2).tolist() == pytest.approx([first, second], abs=2 * bins)

    def test_every_row_has_the_same_levels_each_part_has_a_zero(self) -> None:
        q = frozen(gaussian(16, 512), fitting("splitquant"))
        assert isinstance(q.levels, Table)
        levels_OPC = (q.levels.values[:, 0] * q.scales()).unflatten(-1, (3, 16))
        assert (levels_OPC == levels_OPC[:1]).all()
        assert (levels_OPC == 0).any(-1).all()
        steps_OPC = levels_OPC.double().diff()
        assert torch.equal(steps_OPC, steps_OPC[..., :1].expand_as(steps_OPC))  # evenly spaced, not a bit off
        back = PackedLinear.from_qtensor(q).qtensor()
        assert torch.equal(back.dequantize(), q.dequantize())

    @pytest.mark.parametrize("kind", ["one value", "no weight", "positive", "an outlier", "two values"])
    def test_clusters_may_be_empty(self, kind: str) -> None:
        w_OI, scheme = gaussian(8, 64), fitting("splitquant")
        w_OI = {
            "one value": torch.full_like(w_OI, 0.3),
            "no weight": torch.zeros_like(w_OI),
            "positive": w_OI.abs() + 1,
            "an outlier": torch.where(w_OI == w_OI.max(), 1e4, w_OI),
            "two values": w_OI.sign() * 0.2,
        }[kind]
        q = frozen(w_OI, scheme)
        w_N, q_N = w_OI.flatten(), q.dequantize().flatten()
        assert q_N.isfinite().all()
        span = max(w_N.max().item(), 0) - min(w_N.min().item(), 0)
        assert (q_N - w_N).abs().max() <= 0.51 * span / 15 + 1e-6  # no worse than sixteen levels


def published_parts(w_OI: Tensor, scheme: QuantScheme) -> list[tuple[Tensor, Tensor]]:
    """Each cluster's weights, and what its own sixteen levels make of them."""
    q = frozen(w_OI, scheme)
    assert isinstance(q.levels, Table)
    levels = (q.levels.values[0, 0] * q.scales()[0]).view(3, 16)
    w = w_OI.flatten()
    found, bounds = [], torch.tensor(_boundaries(w_OI, w.min().item(), w.max().item()))
    for part in range(3):
        own = w[torch.bucketize(w, bounds) == part]
        found.append((levels[part][(own[:, None] - levels[part]).abs().argmin(-1)], own))
    return found
