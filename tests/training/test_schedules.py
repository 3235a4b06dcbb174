"""Schedules against their closed forms."""

import json
import math
from dataclasses import asdict, fields, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leap_pl.checkpoints.settings import check_settings
from leap_pl.errors import UserError
from leap_pl.training.schedules import (
    UNMOVED,
    Annealing,
    Curve,
    Schedule,
    learned_by,
    warmup_cosine,
)

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


# -- those of α and τ ---------------------------------------------------------------------------------------

ends = st.floats(1e-3, 1e4)
schedules = st.builds(Schedule, ends, ends, st.sampled_from(MOVING)) | ends.map(lambda x: Schedule(x, x, "constant"))
annealings = st.builds(Annealing, schedules, schedules, schedules)


@given(annealing=annealings)
def test_they_come_back_from_plain_values(annealing: Annealing) -> None:
    """As they lie in a checkpoint, whose values may have been through JSON."""
    told = json.loads(json.dumps(asdict(annealing)))
    assert Annealing.of(told) == annealing == learned_by({"annealing": told})


@given(annealing=annealings, x=fractions)
def test_what_is_in_range_stays_there(annealing: Annealing, x: float) -> None:
    assert annealing.tau(x) > 0
    assert annealing.alpha(x) >= 0
    assert annealing.pattern_alpha(x) >= 0


@pytest.mark.parametrize(
    ("schedules", "says"),
    [
        ({"tau": Schedule(4, 0)}, "model.annealing.tau goes from 4 to 0; a temperature is above 0"),
        ({"tau": Schedule(-1, 1)}, "temperature is above 0"),
        ({"alpha": Schedule(-1, 350)}, "model.annealing.alpha goes from -1 to 350. Give a number from 0"),
        ({"pattern_alpha": Schedule(1, -2)}, "model.annealing.pattern_alpha goes from 1 to -2"),
    ],
)
def test_what_is_out_of_range_is_refused(schedules: dict[str, Schedule], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Annealing(**schedules)


def test_a_logit_scale_may_begin_at_zero() -> None:
    assert Annealing(alpha=Schedule(0, 350)).alpha(0) == 0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, True, "1", None])
def test_a_schedule_of_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="give finite numbers"):
        Schedule(value, 1)


def test_a_curve_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="no curve 'square'"):
        Schedule(1, 2, "square")  # type: ignore[arg-type]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["alpha", "tau", "start", "end", "curve", ""]) | st.integers(), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(told=plain)
def test_damaged_schedules_are_refused_in_one_line(told: Any) -> None:
    try:
        found = Annealing.of(told)
    except UserError as error:
        assert str(error).startswith("model.annealing")
        assert len(str(error)) < 1000
    else:
        assert isinstance(found, Annealing)


@pytest.mark.parametrize("settings", [None, 3, "x", [1]])
def test_settings_of_a_checkpoint_that_are_none_are_refused(settings: Any) -> None:
    with pytest.raises(UserError, match="which does not describe schedules"):
        learned_by(settings)


@given(one=annealings, other=annealings)
def test_a_run_goes_on_by_its_own_schedules_only(one: Annealing, other: Annealing) -> None:
    check_settings({"model.annealing": asdict(one)}, {"model.annealing": asdict(one)})
    for field in fields(Annealing):
        now = replace(one, **{field.name: getattr(other, field.name)})
        if now == one:
            continue
        with pytest.raises(UserError, match=f"model.annealing.{field.name}.") as caught:
            check_settings({"model.annealing": asdict(one)}, {"model.annealing": asdict(now)})
        was, now_is = (asdict(side)[field.name] for side in (one, now))
        for part in was:
            if was[part] != now_is[part]:
                assert f"{field.name}.{part} was {was[part]!r} and is {now_is[part]!r}" in str(caught.value)


def test_a_checkpoint_that_tells_no_schedules_is_of_a_run_in_which_none_moved() -> None:
    assert learned_by({}) == UNMOVED
    assert [UNMOVED.alpha(x) for x in (0, 1)] == [25, 25]
    assert [UNMOVED.tau(x) for x in (0, 1)] == [4, 4]
