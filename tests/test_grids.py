"""Laws every grid obeys, and SEQ's own arithmetic against its definition in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pairwise import pairwise
from schemes import PLAIN, SCALAR, fitting
from upq.core.levels import Levels, Table, Uniform
from upq.core.scheme import PER_CHANNEL, QuantScheme, to_groups
from upq.grids import GRIDS, Params, learned, search_scale
from upq.grids._base import SHRINK

BITS = range(2, 9)
GROUPS = [PER_CHANNEL, 8, 24]
every_grid = pytest.mark.parametrize("name", SCALAR)


def weight(o: int = 6, i: int = 96, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.3 * torch.randn(o, i, generator=torch.Generator().manual_seed(seed))).to(dtype)


def shrunk(name: str, w_OI: Tensor, scheme: QuantScheme, factor: float = 0.6) -> Params:
    """Parameters as training leaves them: levels that cover part of the range, so that some weights are clipped."""
    params = GRIDS.get(name).init(w_OI, scheme)
    moved = learned(params, scheme).items()
    return params | {k: v + math.log(factor) if k.startswith("log_") else factor * v for k, v in moved}


UNSEARCHED = ("splitquant",)  # grids whose levels are those of the range, whatever the search is asked for
every_searched = pytest.mark.parametrize("name", [name for name in SCALAR if name not in UNSEARCHED])


def same(a: Levels, b: Levels) -> bool:
    if isinstance(a, Table) and isinstance(b, Table):
        return torch.equal(a.values.cpu(), b.values)
    return isinstance(a, Uniform) and a == b


class TestLaws:
    @pairwise(
        name=SCALAR,
        bits=BITS,
        group_size=GROUPS,
        dtype=[torch.float32, torch.bfloat16],
        scale_dtype=["float16", "bfloat16", "float32"],
    )
    def test_fake_equals_frozen(
        self, name: str, bits: int, group_size: int, dtype: torch.dtype, scale_dtype: str, device: str
    ) -> None:
        scheme = fitting(name, bits=bits, group_size=group_size, scale_dtype=scale_dtype)
        grid, w_OI = GRIDS.get(name), weight(dtype=dtype).to(device)
        for params in (grid.init(w_OI, scheme), search_scale(w_OI, scheme), shrunk(name, w_OI, scheme)):
            fake_OI, frozen = grid.fake(w_OI, params, scheme), grid.freeze(w_OI, params, scheme)
            assert fake_OI.dtype == torch.float32
            assert torch.equal(fake_OI, frozen.dequantize())
            assert frozen.scheme == scheme
            assert frozen.scale_OG.dtype == scheme.scale_torch_dtype
            assert int(frozen.codes_OI.max()) < scheme.levels
            shared = grid.shared(scheme)
            assert shared is None or same(frozen.levels, shared)
            assert grid.uniform is isinstance(frozen.levels, Uniform)

    @pairwise(name=SCALAR, bits=BITS, group_size=GROUPS)
    def test_idempotent(self, name: str, bits: int, group_size: int) -> None:
        scheme, grid, w_OI = fitting(name, bits=bits, group_size=group_size), GRIDS.get(name), weight()
        for params in (grid.init(w_OI, scheme), shrunk(name, w_OI, scheme)):
            once = grid.freeze(w_OI, params, scheme)
            assert torch.equal(grid.freeze(once.dequantize(), params, scheme).codes_OI, once.codes_OI)

    @pytest.mark.parametrize("name", PLAIN)
    @pytest.mark.parametrize("group_size", GROUPS)
    def test_error_falls_with_bits(self, name: str, group_size: int) -> None:
        def mse(bits: int, start: str) -> float:
            scheme, grid = QuantScheme(bits=bits, group_size=group_size, grid=name), GRIDS.get(name)
            params = grid.init(weight(), scheme) if start == "max" else search_scale(weight(), scheme)
            return (grid.fake(weight(), params, scheme) - weight()).square().mean().item()

        for start in ("max", "mse"):
            errors = [mse(bits, start) for bits in BITS]
            assert all(finer < 0.5 * coarser for coarser, finer in itertools.pairwise(errors)), errors

    @every_grid
    def test_error_is_within_half_a_step_of_the_range(self, name: str) -> None:
        """Nearest rounding: at the range, no weight is further from its level than half the distance of two levels."""
        for bits in BITS:
            scheme = fitting(name, bits=bits, group_size=8, scale_dtype="float32")
            grid, w_OI = GRIDS.get(name), weight()
            params = grid.init(w_OI, scheme)
            frozen = grid.freeze(w_OI, params, scheme)
            error_OGS = to_groups(frozen.dequantize() - w_OI, scheme).abs()
            if isinstance(frozen.levels, Table):
                half = frozen.levels.values.sort(-1).values.diff(dim=-1).amax(-1) / 2
                choice_OG = frozen.levels.choice_OG
                half = half if choice_OG is None else half[choice_OG.long()]
            else:  # affine's integer zero point may cut off half a step more at an end of the range
                half = torch.tensor(0.5 if grid.zero(scheme) is not None else 1.0)
            slack = 1.0001 if scheme.scale_dtype == "float32" else 1.01  # a rounded scale cuts the range
            assert (error_OGS <= ((half * slack) * frozen.scales())[..., None]).all()

    @every_grid
    @pytest.mark.parametrize("group_size", GROUPS)
    def test_the_weight_and_every_parameter_learn(self, name: str, group_size: int, device: str) -> None:
        scheme, grid = fitting(name, group_size=group_size), GRIDS.get(name)
        w_OI = weight(dtype=torch.float32).to(device).requires_grad_()
        params = shrunk(name, w_OI.detach(), scheme)
        learning = {k: v.requires_grad_() for k, v in learned(params, scheme).items()}
        g_OI = torch.randn(w_OI.shape, generator=torch.Generator().manual_seed(1)).to(device)
        (grid.fake(w_OI, params, scheme) * g_OI).sum().backward()
        assert w_OI.grad is not None
        assert (to_groups(w_OI.grad, scheme) != 0).any(-1).all()
        for key, value in learning.items():
            assert value.grad is not None, key
            assert (value.grad != 0).all(), key

    @every_grid
    def test_rows_and_groups_are_independent(self, name: str) -> None:
        scheme, w_OI = fitting(name, bits=3, group_size=8), weight()
        whole_row = scheme.scale.outer == "row" or scheme.group_size == PER_CHANNEL
        grid = GRIDS.get(name).settled([w_OI])
        size = w_OI.shape[1] if whole_row else w_OI.shape[1] // scheme.groups(w_OI.shape[1])
        whole = grid.freeze(w_OI, grid.init(w_OI, scheme), scheme)
        for row, start in ((0, 0), (3, 0 if whole_row else size), (5, w_OI.shape[1] - size)):
            part = w_OI[row : row + 1, start : start + size]
            alone = grid.freeze(part, grid.init(part, scheme), scheme)
            assert torch.equal(alone.codes_OI, whole.codes_OI[row : row + 1, start : start + size])
            assert torch.equal(alone.scale_OG[0], whole.scale_OG[row, start // size :][: alone.scale_OG.shape[1]])

    @pairwise(name=SCALAR, size=[0.0, 1e-38, 1e-8, 1e4, 1e30], bits=BITS, scale_dtype=["float16", "bfloat16"])
    def test_empty_tiny_and_huge_rows_stay_finite(self, name: str, size: float, bits: int, scale_dtype: str) -> None:
        scheme, grid = fitting(name, bits=bits, group_size=8, scale_dtype=scale_dtype), GRIDS.get(name)
        w_OI = weight()
        w_OI[1] *= size
        for params in (
            grid.init(w_OI, scheme),
            search_scale(w_OI, scheme),
            search_scale(w_OI, scheme, torch.zeros(96)),
        ):
            leaves = {k: v.clone().requires_grad_() for k, v in learned(params, scheme).items()}
            latent_OI = w_OI.clone().requires_grad_()
            fake_OI, frozen = grid.fake(latent_OI, params | leaves, scheme), grid.freeze(w_OI, params, scheme)
            assert torch.equal(fake_OI, frozen.dequantize())
            assert fake_OI.isfinite().all()
            assert (frozen.scales() > 0).all()
            fake_OI.sum().backward()
            assert all(t.grad.isfinite().all() for t in (latent_OI, *leaves.values()))
            if size <= 1e4:  # float16 scales end at 65504
                # what cannot be represented costs at most the smallest scale
                assert (fake_OI - w_OI)[1].abs().max() <= max(2 * size, 2.0**-19)


class TestSearch:
    @pairwise(name=SCALAR, bits=BITS, group_size=GROUPS)
    def test_never_worse_than_the_range(self, name: str, bits: int, group_size: int) -> None:
        scheme, grid = fitting(name, bits=bits, group_size=group_size), GRIDS.get(name)
        for seed in range(3):
            w_OI = weight(seed=seed) ** 3  # heavy tails
            for importance in (None, torch.rand(96, generator=torch.Generator().manual_seed(seed)) ** 4):

                def error(params: Params, w_OI: Tensor = w_OI, importance: Tensor | None = importance) -> Tensor:
                    e_OI = (grid.fake(w_OI, params, scheme) - w_OI).square()
                    error_OG = to_groups(e_OI if importance is None else e_OI * importance, scheme).sum(-1)
                    return error_OG.sum(-1) if scheme.scale.outer == "row" else error_OG

                ranged, searched = error(grid.init(w_OI, scheme)), error(search_scale(w_OI, scheme, importance))
                assert (searched <= ranged).all()
                if scheme.bits == 2:
                    assert searched.sum() < 0.95 * ranged.sum()

    @every_searched
    def test_importance_moves_the_scale_to_the_weights_that_matter(self, name: str) -> None:
        scheme, grid = fitting(name), GRIDS.get(name)
        w_OI, importance_I = weight() ** 3, torch.zeros(96)
        importance_I[::6] = 1.0
        plain, weighed = (grid.fake(w_OI, search_scale(w_OI, scheme, i), scheme) for i in (None, importance_I))
        assert ((weighed - w_OI)[:, ::6].square().sum() < 0.9 * (plain - w_OI)[:, ::6].square().sum()).item()
        assert ((weighed - w_OI).square().sum() > (plain - w_OI).square().sum()).item()

    # The searches of the other two are no list: tests/test_related_grids.py
    @pytest.mark.parametrize("name", [name for name in SCALAR if name not in ("r2q", "dgq", *UNSEARCHED)])
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_matches_a_search_over_every_candidate_in_float64(self, name: str, bits: int) -> None:
        scheme = fitting(name, bits=bits)
        if scheme.bits != bits and bits > 2:
            pytest.skip("the grid has one width")
        size = 8 if scheme.group_size == PER_CHANNEL else scheme.group_size
        for seed in range(5):
            w_OI = weight(1, size, seed=seed)
            importance = [1.0, 0.1, 3.0, 0.0, 1.0, 1.0, 0.5, 2.0] * (size // 8)
            found = GRIDS.get(name).fake(w_OI, search_scale(w_OI, scheme, torch.tensor(importance)), scheme)
            row = [float(x) for x in w_OI[0]]
            tried = [rounded(row, levels) for levels in every_levels(name, row, scheme.bits)]
            best = min(weighted_error(row, values, importance) for values in tried)
            assert weighted_error(row, found[0].tolist(), importance) <= best * (1 + 1e-4)

    @pytest.mark.parametrize("name", ["seq", "sym", "q2_0"])
    @pytest.mark.parametrize(("bits", "group_size"), [(2, 8), (2, 64), (2, -1), (3, 64), (4, -1)])
    def test_no_candidate_has_less_error(self, name: str, bits: int, group_size: int) -> None:
        """Of those of the range and its shrunken ones, group by group; stored scales are within 2⁻¹² of their own."""
        scheme, grid = fitting(name, bits=bits, group_size=group_size), GRIDS.get(name)
        importance_I = torch.rand(640, generator=torch.Generator().manual_seed(1)) ** 4
        w_OI = weight(9, 640, seed=2) ** 3
        w_OI[3] = w_OI[3].sign() * 0.25  # what two levels hold
        w_OI[4] = 0

        def error(params: Params) -> Tensor:
            return to_groups((grid.fake(w_OI, params, scheme) - w_OI).square() * importance_I, scheme).sum(-1)

        best = torch.stack([error(grid.init(w_OI * shrink, scheme)) for shrink in [1.0, *SHRINK.tolist()]]).amin(0)
        found = error(search_scale(w_OI, scheme, importance_I))
        assert (found <= best * (1 + 3e-4) + 1e-12).all()
        assert group_size == 8 or found.sum() < best.sum()  # of 8 weights a histogram costs more than the candidates

    @every_grid
    @pytest.mark.parametrize("group_size", GROUPS)
    def test_rows_at_a_time_change_no_bit(self, name: str, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        scheme, w_OI = fitting(name, group_size=group_size), weight(7)
        importance_I, grid = weight(1)[0].abs(), GRIDS.get(name)

        def gradients() -> list[Tensor]:
            latent_OI, params = w_OI.clone().requires_grad_(), shrunk(name, w_OI, scheme)
            leaves = [latent_OI, *(v.requires_grad_() for v in learned(params, scheme).values())]
            fake_OI = grid.fake(latent_OI, params, scheme)
            return [fake_OI.detach(), *torch.autograd.grad(fake_OI, leaves, weight(7, seed=1))]

        whole, values = search_scale(w_OI, scheme, importance_I), gradients()
        for weights in (1, 2 * 96, 100 * 96):
            monkeypatch.setattr("upq.grids._base.CHUNK", weights)
            found = search_scale(w_OI, scheme, importance_I)
            assert all(torch.equal(found[k], v) for k, v in whole.items())
            assert all(map(torch.equal, gradients(), values))

    @every_searched
    def test_candidates_are_dense_enough(self, name: str) -> None:
        """At most 5 % above the best of many more scales."""
        scheme, grid, w_OI = fitting(name), GRIDS.get(name), weight(8, 512)

        def error(params: Params) -> Tensor:
            error_OG = to_groups((grid.fake(w_OI, params, scheme) - w_OI).square(), scheme).sum(-1)
            return error_OG.sum(-1) if scheme.scale.outer == "row" else error_OG

        fine = torch.stack([error(grid.init(s * w_OI, scheme)) for s in torch.linspace(0.05, 1.5, 1000).tolist()])
        assert (error(search_scale(w_OI, scheme)) <= 1.05 * fine.amin(0)).all()


def weighted_error(row: list[float], rounded: list[float], importance: list[float]) -> float:
    return sum(i * (a - b) ** 2 for a, b, i in zip(row, rounded, importance, strict=True))


def rounded(row: list[float], levels: list[float]) -> list[float]:
    """Each weight's closest level, tried one by one."""
    return [min(levels, key=lambda level: abs(level - w)) for w in row]


def every_levels(name: str, row: list[float], bits: int) -> Iterator[list[float]]:
    """The levels of each scale that the search has to try, the range's first; scales as they are stored."""

    def half(x: float) -> float:
        return torch.tensor(x, dtype=torch.float16).item()

    codes, peak = range(1 << bits), max(map(abs, row))
    if name in ("mxfp4", "nvfp4", "four_over_six"):
        for scale in fp4_scales(name, peak):
            yield [sign * scale * level for sign in (1, -1) for level in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
        return
    if name == "razer":
        for special in (5, -5, 8, -8):
            for scale in razer_scales(peak, max(6, abs(special))):
                yield [*(s * scale * level for s in (1, -1) for level in (0, 0.5, 1, 1.5, 2, 3, 4, 6)), special * scale]
        return
    for shrink in [1.0, *SHRINK.tolist()]:
        if name == "fp6":
            scale = half(shrink * peak / 28)
            small = [m / 16 for m in range(4)]
            large = [m / 4 * 2.0**e for e in range(-2, 5) for m in range(4, 8)]
            yield [sign * scale * level for sign in (1, -1) for level in small + large]
        elif name == "seq":
            scale = half(shrink * peak / (1 << (bits - 1)))
            yield [(code - ((1 << bits) - 1) / 2) * scale for code in codes]
        elif name in ("sym", "q2_0"):
            half_range = (1 << (bits - 1)) - 0.5
            scale = half(shrink * peak / half_range)
            lowest = 1 << (bits - 1) if name == "sym" else (1 << (bits - 1)) - 1
            yield [(code - lowest) * scale for code in codes]
        else:
            low, high = shrink * min(0.0, *row), shrink * max(0.0, *row)
            exact = (high - low) / ((1 << bits) - 1)
            zero, scale = round(-low / exact), half(exact)
            yield [(code - zero) * scale for code in codes]


def razer_scales(peak: float, top: float) -> list[float]:
    outer = next(2.0**e for e in range(-20, 40) if peak / (6 * 2.0**e) <= 28)
    stored = sorted({m / 8 * 2.0**e for e in range(-2, 5) for m in range(8, 16)} | {m / 32 for m in range(1, 8)})
    stored = [value for value in stored if value <= 28]
    near = min(range(len(stored)), key=lambda i: abs(stored[i] * outer - peak / top))
    return [value * outer for value in stored[max(0, near - 8) : near + 9]]


def fp4_scales(name: str, peak: float) -> list[float]:
    if name == "mxfp4":  # the power of two that brings the peak to [3.5, 7), its double, its half and its quarter
        start = next(2.0**e for e in range(-40, 40) if 3.5 <= peak / 2.0**e < 7)
        return [start * factor for factor in (1, 2, 0.5, 0.25)]
    outer = next(2.0**e for e in range(-20, 40) if peak / (6 * 2.0**e) <= 224)
    stored = sorted({m / 8 * 2.0**e for e in range(-6, 9) for m in range(8, 16)} | {m * 2.0**-9 for m in range(1, 8)})
    stored = [value for value in stored if value <= 448]
    near = min(range(len(stored)), key=lambda i: abs(stored[i] * outer - peak / 6))
    return [value * outer for value in stored[max(0, near - 8) : near + 13]]


class TestSymmetricIntegers:
    """`sym` is what engines call int2, `q2_0` its mirror image."""

    @pytest.mark.parametrize(("name", "levels"), [("sym", [-2, -1, 0, 1]), ("q2_0", [-1, 0, 1, 2])])
    def test_levels_at_two_bits(self, name: str, levels: list[int]) -> None:
        params = {"log_scale": torch.zeros(1, 1)}
        fake_OI = GRIDS.get(name).fake(torch.linspace(-4, 4, 97)[None], params, QuantScheme(bits=2))
        assert fake_OI.unique().tolist() == levels

    @pytest.mark.parametrize("group_size", GROUPS)
    @pytest.mark.parametrize("bits", BITS)
    def test_they_mirror_each_other(self, bits: int, group_size: int) -> None:
        sym, q2_0 = GRIDS.get("sym"), GRIDS.get("q2_0")
        a, b = (QuantScheme(bits=bits, group_size=group_size, grid=name) for name in ("sym", "q2_0"))
        left = sym.freeze(weight(), search_scale(weight(), a), a)
        right = q2_0.freeze(-weight(), search_scale(-weight(), b), b)
        assert torch.equal(left.dequantize(), -right.dequantize())
        assert torch.equal(left.codes_OI, a.levels - 1 - right.codes_OI)


class TestSeq:
    def test_two_bit_levels_are_quarters(self) -> None:
        scheme, grid = QuantScheme(bits=2), GRIDS.get("seq")
        delta = 0.375
        w_OI = torch.tensor([[-9.0, -0.74, -0.5, -0.26, -1e-6, 0.0, 0.26, 0.49, 0.51, 0.74, 9.0]]) * delta
        fake_OI = grid.fake(w_OI, {"log_delta": torch.tensor([[delta]]).log()}, scheme)
        expected = torch.tensor([[-0.75, -0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, 0.75, 0.75, 0.75]]) * delta
        torch.testing.assert_close(fake_OI, expected, rtol=2**-11, atol=0)
        levels = grid.fake(torch.linspace(-1, 1, 97)[None], {"log_delta": torch.zeros(1, 1)}, scheme).unique()
        assert levels.tolist() == [-0.75, -0.25, 0.25, 0.75]

    @pytest.mark.parametrize("bits", BITS)
    def test_levels_are_odd_multiples(self, bits: int) -> None:
        n, delta = 2 ** (bits - 1), 2.0
        params = {"log_delta": torch.full((1, 1), math.log(delta))}
        fake_OI = GRIDS.get("seq").fake(torch.linspace(-3, 3, 5001)[None], params, QuantScheme(bits=bits))
        assert fake_OI.unique().tolist() == [delta * (2 * k + 1) / (2 * n) for k in range(-n, n)]

    @given(
        high=st.integers(3, 8),
        low=st.integers(2, 7),
        sixteenths=st.lists(st.integers(-5000, 5000), min_size=8, max_size=8),
        free=st.lists(st.floats(-4, 4, width=32), min_size=8, max_size=8),
        delta=st.floats(0.01, 4),
    )
    @settings(max_examples=200, deadline=None)
    def test_fewer_bits_are_the_top_bits(
        self, high: int, low: int, sixteenths: list[int], free: list[float], delta: float
    ) -> None:
        """Same Δ: the 2-bit code is the top two bits of the 4-bit code, on the cell boundaries (ties) as well."""
        if low >= high:
            return
        grid, fine, coarse = GRIDS.get("seq"), QuantScheme(bits=high), QuantScheme(bits=low)
        params = {"log_delta": torch.tensor([[delta]]).log()}
        stored = grid.freeze(torch.ones(1, 8), params, fine).scale_OG.float() * 2 ** (high - 1)
        ties_OI = torch.tensor([sixteenths]) * (stored / 2 ** (high + 1))
        for w_OI in (ties_OI, torch.tensor([free])):
            a, b = grid.freeze(w_OI, params, fine), grid.freeze(w_OI, params, coarse)
            assert torch.equal(a.codes_OI >> (high - low), b.codes_OI)
            assert torch.equal(a.scale_OG.float() * 2 ** (high - low), b.scale_OG.float())

    @pytest.mark.parametrize("group_size", GROUPS)
    @pytest.mark.parametrize("bits", BITS)
    def test_backward_is_the_papers(self, bits: int, group_size: int) -> None:
        """dW = g·1[|u|<1-ε]; dΔ = s·(Σ inside g·(q-u) + Σ outside g·q); Δ = exp(log Δ)."""
        scheme, grid = QuantScheme(bits=bits, group_size=group_size), GRIDS.get("seq")
        w_OI = weight().requires_grad_()
        log_delta = shrunk("seq", w_OI.detach(), scheme)["log_delta"].requires_grad_()
        g_OI = torch.randn(w_OI.shape, generator=torch.Generator().manual_seed(1))
        grid.fake(w_OI, {"log_delta": log_delta}, scheme).backward(g_OI)

        n = 2 ** (bits - 1)
        stored = grid.freeze(w_OI, {"log_delta": log_delta}, scheme).scale_OG.double() * n
        w, g = to_groups(w_OI.detach().double(), scheme), to_groups(g_OI.double(), scheme)
        u = w / stored[..., None]
        epsilon = 0.02 / n  # 0.99 at 2 bits, as ParetoQ
        q = (torch.round(n * u.clamp(-1 + epsilon, 1 - epsilon) - 0.5) + 0.5) / n
        inside = u.abs() < 1 - epsilon
        s = 1 / math.sqrt(w.shape[-1] * max(n - 1, 1))
        d_delta = s * (torch.where(inside, g * (q - u), g * q)).sum(-1)
        assert 0 < inside.float().mean() < 1
        torch.testing.assert_close(to_groups(w_OI.grad.double(), scheme), g * inside, rtol=0, atol=0)
        torch.testing.assert_close(
            log_delta.grad.double(), d_delta * log_delta.detach().double().exp(), rtol=1e-5, atol=1e-7
        )
