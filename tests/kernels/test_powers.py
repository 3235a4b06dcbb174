"""The kernels' logarithm and power against float64."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from leap_pl.kernels.powers import exp2, log2

FLOATS = st.floats(min_value=2.0**-120, max_value=2.0**120, width=32)


@given(FLOATS)
def test_log2_is_exact_to_rounding(x: float) -> None:
    found = log2(torch.tensor([x])).item()
    assert abs(found - math.log2(x)) <= 2e-7 * max(1, abs(math.log2(x)))


def test_log2_is_relatively_exact_around_1() -> None:
    """Where the logarithm is small, as noise near 0 is and Gumbel noise far out."""
    x = 1 + torch.arange(-(2**20), 2**20 + 1, 7).float() * 2.0**-23
    expected = x.double().log2()
    assert ((log2(x).double() - expected).abs() <= 3e-7 * expected.abs()).all()
    assert log2(torch.ones(1)).item() == 0


@given(st.floats(min_value=-125, max_value=126, width=32))
def test_exp2_is_exact_to_rounding(x: float) -> None:
    assert abs(exp2(torch.tensor([x])).item() / 2.0**x - 1) <= 4e-7


def test_exp2_beyond_its_range() -> None:
    x = torch.tensor([-126.5, -1e10, -math.inf, 127.5, 1e10, math.inf, math.nan])
    assert exp2(x).tolist()[:6] == [0.0] * 3 + [math.inf] * 3
    assert math.isnan(exp2(x)[6])
