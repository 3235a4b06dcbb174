"""Clipping in the optimizer's own pass against torch's, which scales the gradients first."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from leap_pl.training.clipping import clip_by_norm
from leap_pl.training.optimizers import PackedAdamW


def pair(seed: int, scale: float, dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Two equal lists of parameters, all 0, with equal gradients."""
    generator = torch.Generator().manual_seed(seed)
    lists: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for shape in ((7, 33), (5,), (1, 1)):
        gradient = (torch.randn(shape, generator=generator) * scale).to(dtype)
        for each in lists:
            each.append(nn.Parameter(torch.zeros(shape, dtype=dtype)))
            each[-1].grad = gradient.clone()
    return lists


# An ε far above the gradients takes Adam its adaptive scale: its step is the gradient, by whatever that was divided.
ADAM = {"lr": 1e6, "betas": (0.0, 0.0), "eps": 1e6}


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("fused", [True, False])
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3), limit=st.floats(1e-2, 1e2))
def test_a_step_is_as_by_torch(make, fused: bool, seed: int, scale: float, limit: float) -> None:
    ours, theirs = pair(seed, scale)
    settings = {"lr": 1.0} if make is torch.optim.SGD else ADAM
    first, second = (make(parameters, fused=fused, **settings) for parameters in (ours, theirs))
    for step in range(2):
        gradients = [parameter.grad for parameter in ours]
        clip_by_norm(first, ours, limit, nn.utils.get_total_norm(gradients))
        nn.utils.clip_grad_norm_(theirs, limit)
        first.step()
        second.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * limit)
            assert step or one.count_nonzero() > 0
            # The next step is not clipped, and not by this one's number.
            one.grad = torch.full_like(one, limit / 100)
            other.grad = one.grad.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("eager")
def test_a_packed_step_is_that_of_smaller_gradients(dtype: torch.dtype) -> None:
    """By a power of 2, so that what other optimizers would do first is exact; and the step after it is not clipped."""
    ours, theirs = pair(3, 1.0, dtype)
    first, second = PackedAdamW(ours, eps=1.0), PackedAdamW(theirs, eps=1.0)
    for divisor in (8.0, None):
        if divisor is not None:
            clip_by_norm(first, ours, 1.0, torch.tensor(divisor) - 1e-6)
        for parameter in theirs:
            parameter.grad = parameter.grad / (divisor or 1.0)
        first.step()
        second.step()
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(first.state[one]["packed_moments"], second.state[other]["packed_moments"])
            other.grad = one.grad.clone()


@pytest.mark.parametrize("make", [partial(torch.optim.AdamW, fused=True), PackedAdamW])
def test_no_pass_over_the_gradients_is_taken(make) -> None:
    ours, _ = pair(0, 1.0)
    kept = [parameter.grad.clone() for parameter in ours]
    clip_by_norm(make(ours), ours, 0.1, nn.utils.get_total_norm(kept))
    assert all(torch.equal(parameter.grad, before) for parameter, before in zip(ours, kept, strict=True))


def test_where_a_fused_step_may_not_read_a_scale_gradients_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Apple's GPUs before torch 2.13."""
    ours, theirs = pair(0, 10.0)
    optimizer = torch.optim.AdamW(ours, fused=True, **ADAM)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in ours])
    monkeypatch.setattr(nn.Parameter, "device", torch.device("mps"))
    clip_by_norm(optimizer, ours, 1.0, norm)
    monkeypatch.undo()
    assert getattr(optimizer, "grad_scale", None) is None
    nn.utils.clip_grad_norm_(theirs, 1.0)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
