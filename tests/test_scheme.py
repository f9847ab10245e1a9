"""Schemes refuse what cannot be held; a QTensor means exactly what its formula says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upq.core.errors import UPQError
from upq.core.levels import Uniform
from upq.core.scheme import PER_CHANNEL, QTensor, QuantScheme, to_groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, r"bits must be in 2\.\.8, got 1"),
        ({"bits": 9}, r"bits must be in 2\.\.8, got 9"),
        ({"bits": 2, "group_size": 12}, "multiple of 8, got 12"),
        ({"bits": 2, "group_size": 0}, "multiple of 8, got 0"),
        ({"bits": 2, "group_size": -8}, "multiple of 8, got -8"),
        (
            {"bits": 2, "scale_dtype": "float64"},
            "scale_dtype must be one of float16, bfloat16, float32, e8m0, e4m3, e3m3, int8, got",
        ),
    ],
)
def test_impossible_schemes_are_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(UPQError, match=message):
        QuantScheme(**options)


def test_a_scheme_is_a_value() -> None:
    int4 = QuantScheme(bits=4, group_size=64)
    int2 = dataclasses.replace(int4, bits=2)
    assert {int4: "a", int2: "b"}[QuantScheme(bits=2, group_size=64)] == "b"
    assert (int4.levels, int2.levels) == (16, 4)
    assert int2.scale_torch_dtype is torch.float16
    with pytest.raises(dataclasses.FrozenInstanceError):
        int4.bits = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("group_size", "width", "remedy"),
    [(64, 96, "try group_size=32 or -1"), (64, 44, r"try group_size=-1 \(per channel\)"), (128, 64, "group_size=64")],
)
def test_an_unfit_group_size_names_one_that_fits(group_size: int, width: int, remedy: str) -> None:
    with pytest.raises(UPQError, match=f"in_features {width} is not a multiple of group_size {group_size}; .*{remedy}"):
        QuantScheme(bits=2, group_size=group_size).groups(width)


def test_groups_are_runs_of_neighbours() -> None:
    w_OI = torch.arange(48).view(2, 24)
    grouped = to_groups(w_OI, QuantScheme(bits=2, group_size=8))
    assert grouped[1, 2].tolist() == list(range(40, 48))
    assert QuantScheme(bits=2).groups(45) == 1
    assert torch.equal(to_groups(w_OI, QuantScheme(bits=2))[:, 0], w_OI)


@given(
    bits=st.integers(2, 8),
    groups=st.integers(1, 3),
    grouped=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "bfloat16"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_dequantize_is_exact(bits: int, groups: int, grouped: bool, scale_dtype: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scheme = QuantScheme(bits=bits, group_size=8 if grouped else PER_CHANNEL, scale_dtype=scale_dtype)
    width = 8 * groups
    codes_OI = torch.randint(scheme.levels, (3, width), generator=generator).to(torch.uint8)
    scale_OG = torch.rand(3, scheme.groups(width), generator=generator).add(0.01).to(scheme.scale_torch_dtype)
    zero_OG = torch.randint(2 * scheme.levels, scale_OG.shape, generator=generator) / 2  # integers and halves
    q = QTensor(codes_OI, scale_OG, Uniform(zero_OG), scheme)
    dense_OI = q.dequantize()
    assert dense_OI.dtype == torch.float32
    size = width // scale_OG.shape[1]
    for o in range(3):
        for i in range(width):
            exact = (int(codes_OI[o, i]) - zero_OG[o, i // size].item()) * scale_OG[o, i // size].item()
            assert dense_OI[o, i].item() == exact
