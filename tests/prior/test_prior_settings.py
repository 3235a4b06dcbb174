"""Files of masks as priors: by their forms, under today's names and a former one."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from leap_pl.errors import UserError
from leap_pl.inputs.plain_values import read
from leap_pl.masks.patterns import Unstructured
from leap_pl.prior import Prior


def test_the_former_name_of_the_inner_mask_is_taken() -> None:
    former, now = {"inner_mask": "a.safetensors"}, {"masks": {"inner": "a.safetensors"}}
    assert Prior(**former) == Prior(**now) == Prior(**former, **now) == read(former, Prior, "x")  # type: ignore[arg-type]
    assert Prior(inner_mask=None) == Prior() == read({"inner_mask": None}, Prior, "x")
    assert "inner_mask" not in asdict(Prior(**former))  # type: ignore[arg-type]
    assert replace(Prior(**former), sequences=3).masks == now["masks"]  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"prior\.inner_mask is b and prior\.masks\.inner a.safetensors, and both are"):
        Prior(**now, inner_mask="b")


def test_masks_that_no_gate_asks_for_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Give the prior itself as prior\.mask"):
        Prior(masks={"prior": "a"})
    nothing: Any = None
    with pytest.raises(UserError, match=r"prior\.masks\.inner: these gates start from prior alone"):
        Prior(masks={"inner": "a"}).make(nothing, {}, {"prior": Unstructured(0.5)}, nothing)
