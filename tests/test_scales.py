"""The types of stored scales: what is stored is stored as itself, and nothing nearer could have been."""

from __future__ import annotations

import pytest
import torch

from upq.core.scales import SCALE_TYPES, ScaleType

BYTES = [scale for scale in SCALE_TYPES.values() if scale.dtype == torch.uint8]


def every(scale: ScaleType) -> torch.Tensor:
    """All values between the least and the largest, ascending."""
    stored = torch.arange(64 if scale.name == "e3m3" else 255, dtype=torch.uint8)
    values = scale.decode(stored)
    return values[(values >= scale.smallest) & (values <= scale.largest)].unique()


@pytest.mark.parametrize("scale", BYTES, ids=lambda scale: scale.name)
def test_every_stored_value_is_a_fixed_point(scale: ScaleType) -> None:
    values = every(scale)
    assert len(values) > 25
    assert torch.equal(scale.decode(scale.encode(values)), values)


@pytest.mark.parametrize("scale", BYTES, ids=lambda scale: scale.name)
def test_the_nearest_value_is_stored(scale: ScaleType) -> None:
    values, x = every(scale).double(), torch.rand(400, generator=torch.Generator().manual_seed(0)) * 20 - 8
    x = x.exp2().clamp(scale.smallest, scale.largest)
    of = torch.log2 if scale.name == "e8m0" else torch.Tensor.double  # exponents are rounded, not values
    least = (of(x.double())[:, None] - of(values)).abs().amin(-1)
    found = (of(x.double()) - of(scale.decode(scale.encode(x)).double())).abs()
    torch.testing.assert_close(found, least, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("scale", SCALE_TYPES.values(), ids=lambda scale: scale.name)
def test_what_is_out_of_range_becomes_the_nearest_end(scale: ScaleType) -> None:
    ends = scale.decode(scale.encode(torch.tensor([0.0, 1e-38, scale.largest])))
    assert ends.tolist() == [scale.smallest, scale.smallest, scale.largest]


def test_bytes_are_those_of_the_formats() -> None:
    """OCP's E8M0 and E4M3; RaZeR's E3M3 has bias 3 and no infinities."""
    e8m0, e4m3, e3m3 = (SCALE_TYPES[name] for name in ("e8m0", "e4m3", "e3m3"))
    assert e8m0.encode(torch.tensor([1.0, 2.0, 0.125])).tolist() == [127, 128, 124]
    assert e4m3.encode(torch.tensor([1.0, 448.0, 2.0**-9])).tolist() == [0x38, 0x7E, 0x01]
    assert e3m3.encode(torch.tensor([0.25, 1.0, 28.0, 2.0**-5])).tolist() == [8, 24, 62, 1]
