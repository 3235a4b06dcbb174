"""Schedules against their closed forms."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leap_pl.training.schedules import Curve, Schedule, warmup_cosine

MOVING: list[Curve] = ["linear", "cosine", "exponential"]
FRACTIONS = [i / 200 for i in range(201)]
above_zero = st.floats(1e-3, 1e3)
fractions = st.floats(0, 1)


@pytest.mark.parametrize("curve", MOVING)
@given(start=above_zero, end=above_zero)
def test_they_go_from_start_to_end(curve: Curve, start: float, end: float) -> None:
    schedule = Schedule(start, end, curve)
    assert schedule(0.0) == pytest.approx(start, rel=1e-12)
    assert schedule(1.0) == pytest.approx(end, rel=1e-9, abs=1e-12)
    assert schedule(-0.5) == schedule(0.0)
    assert schedule(1.5) == schedule(1.0)


@pytest.mark.parametrize("curve", MOVING)
@pytest.mark.parametrize(("start", "end"), [(25.0, 350.0), (4.0, 0.05)])
def test_they_are_monotone(curve: Curve, start: float, end: float) -> None:
    values = [Schedule(start, end, curve)(x) for x in FRACTIONS]
    for before, after in pairwise(values):
        assert (after - before) * (end - start) > 0


@given(start=above_zero, end=above_zero, x=fractions)
def test_closed_forms(start: float, end: float, x: float) -> None:
    assert Schedule(start, end)(x) == pytest.approx((1 - x) * start + x * end, rel=1e-9)
    assert Schedule(start, end, "cosine")(x) == pytest.approx(
        start + (end - start) * math.sin(math.pi * x / 2) ** 2, rel=1e-9
    )
    assert Schedule(start, end, "exponential")(x) == pytest.approx(
        math.exp((1 - x) * math.log(start) + x * math.log(end)), rel=1e-9
    )
    assert Schedule(start, start, "constant")(x) == start


def test_the_papers_annealing_half_way() -> None:
    assert Schedule(25, 350)(0.5) == 187.5
    assert Schedule(4, 0.05)(0.5) == pytest.approx(2.025)
    assert Schedule(4, 0.04, "exponential")(0.5) == pytest.approx(0.4)
    assert Schedule(4, 0.05, "cosine")(0.25) == pytest.approx(0.05 + 3.95 * (2 + math.sqrt(2)) / 4)


def test_linear_and_cosine_may_cross_zero() -> None:
    assert Schedule(-1, 1)(0.5) == 0
    assert Schedule(1, 0, "cosine")(1.0) == 0


@pytest.mark.parametrize(("start", "end"), [(0, 1), (1, 0), (-1, 1), (1, -2)])
def test_an_exponential_through_zero_is_refused(start: float, end: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Schedule(start, end, "exponential")


def test_a_constant_that_moves_is_refused() -> None:
    with pytest.raises(ValueError, match="constant schedule cannot go from 1 to 2"):
        Schedule(1, 2, "constant")


@pytest.mark.parametrize(("total", "warmup"), [(2000, 5), (100, 10), (7, 1), (50, 0)])
def test_warmup_then_cosine(total: int, warmup: int) -> None:
    factors = [warmup_cosine(step, total=total, warmup=warmup) for step in range(total + 1)]
    for step in range(warmup):
        assert factors[step] == pytest.approx((step + 1) / warmup)
    for step in range(warmup, total + 1):
        assert factors[step] == pytest.approx(
            math.cos(math.pi * (step - warmup) / (total - warmup) / 2) ** 2, abs=1e-12
        )
    assert factors[0] > 0
    assert factors[warmup] == max(factors) == 1
    assert factors[total] == 0
    assert all(after < before for before, after in pairwise(factors[warmup:]))


def test_warmup_of_the_whole_run_and_longer() -> None:
    assert [warmup_cosine(step, total=3, warmup=3) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert warmup_cosine(3, total=3, warmup=3) == 1
    assert warmup_cosine(1, total=3, warmup=8) == 0.25


def test_the_rate_stays_at_zero_after_the_end() -> None:
    assert warmup_cosine(150, total=100, warmup=5) == 0
