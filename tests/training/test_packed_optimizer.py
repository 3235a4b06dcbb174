"""PackedAdamW: rounding with the exact value as its mean, moments in four bytes, and steps that are AdamW's."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leap_pl.kernels.packed_adamw import (
    HIGHEST_CODE,
    LOWEST_OCTAVE,
    RATIO_STEPS,
    pack,
    ratio_bound,
    round_to_bfloat16,
    unpack,
)
from leap_pl.training import optimizers
from leap_pl.training.optimizers import PackedAdamW

pytestmark = pytest.mark.usefixtures("eager")

BETAS = (0.9, 0.95)
RATIO_STEP = torch.tensor(ratio_bound(*BETAS) / RATIO_STEPS)


# -- rounding -----------------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30))
@settings(max_examples=60, deadline=None)
def test_rounding_has_the_exact_mean(x: float) -> None:
    """Over every value that the random bits can have, and onto the two neighbours alone."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    rounded = round_to_bfloat16(torch.full((1 << 16,), x), bits).double()
    assert float(rounded.mean()) == x  # 2¹⁶ numbers of 8 bits: the sum is exact
    towards_zero = torch.tensor(x).view(torch.int32) & -0x10000  # bfloat16 is the first half of a float32
    neighbours = [float(bits.view(torch.float32)) for bits in (towards_zero, towards_zero + 0x10000)]
    assert {*rounded.unique().tolist()} <= {neighbours[0]} | ({neighbours[1]} if x != neighbours[0] else set())


@given(st.integers(-(1 << 15), (1 << 15) - 1), st.integers(-(1 << 31), (1 << 31) - 1))
def test_numbers_that_are_exact_stay(pattern: int, bits: int) -> None:
    x = torch.tensor([pattern], dtype=torch.int16).view(torch.bfloat16)
    if torch.isfinite(x):
        assert torch.equal(round_to_bfloat16(x.float(), torch.tensor([bits], dtype=torch.int32)).bfloat16(), x)


# -- the packed moments ---------------------------------------------------------------------------------------


def in_the_mean(m: float, v: float) -> tuple[Tensor, Tensor]:
    """(m, v) as they come back, for every value of the two bytes that round them: float64."""
    ratio, level = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    bits = ((ratio << 24) | (level << 16)).to(torch.int32).flatten()
    kept = pack(torch.full(bits.shape, m), torch.full(bits.shape, v), bits, RATIO_STEP)
    assert 0 <= int(kept.min()) <= int(kept.max()) < 1 << 16
    kept = kept.to(torch.int16)  # as it is stored
    back_m, back_v = unpack(kept, RATIO_STEP)
    return back_m.double(), back_v.double()


@given(st.floats(-15.0, 2.5), st.floats(-1.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_moments_come_back_in_the_mean(log_v: float, share: float) -> None:
    v = 10.0**log_v
    m = share * ratio_bound(*BETAS) * math.sqrt(v) * 0.95
    back_m, back_v = in_the_mean(m, v)
    level = 1 + 1 / 8  # the widest step of the grid
    assert float(back_v.min()) >= v / level * 0.999
    assert float(back_v.max()) <= v * level * 1.001
    # A byte of chance: half a 256th of a step.
    assert float(back_v.mean()) == pytest.approx(v, rel=(level - 1) / 512 + 1e-3)
    step = float(RATIO_STEP) * math.sqrt(v * level)
    assert float((back_m - m).abs().max()) <= step * 1.01
    assert float(back_m.mean()) == pytest.approx(m, abs=step / 400)


def test_every_code_is_read_as_it_was_written() -> None:
    ratio = torch.arange(-RATIO_STEPS, RATIO_STEPS + 1, dtype=torch.float64)
    codes = torch.arange(HIGHEST_CODE + 1, dtype=torch.float64)
    v = 2 ** ((codes / 8).floor() + LOWEST_OCTAVE) * (1 + codes % 8 / 8)
    m = ratio[None] * float(RATIO_STEP) * v[:, None].sqrt()
    code = torch.arange(HIGHEST_CODE + 1)[:, None] * 128 + (torch.arange(-RATIO_STEPS, RATIO_STEPS + 1)[None] & 127)
    back_m, back_v = unpack(code.to(torch.int16), RATIO_STEP)
    torch.testing.assert_close(back_m.double(), m, rtol=1e-5, atol=0)
    torch.testing.assert_close(back_v.double(), v[:, None].expand_as(m), rtol=1e-5, atol=0)
    assert torch.equal(unpack(torch.zeros(1, dtype=torch.int16), RATIO_STEP)[0], torch.zeros(1))  # how it begins


def test_moments_of_version_0_1_are_converted_to_the_nearest() -> None:
    """All 2¹⁶ codes: the same ratio u, and the level of v that is nearest."""
    former = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    v = 2 ** (((former.int() >> 7) & 511).double() / 8 + LOWEST_OCTAVE)
    parameter = nn.Parameter(torch.zeros(256, 256))
    optimizer = PackedAdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = optimizer.state_dict()
    del saved["state"][0]["packed_moments"]
    saved["state"][0]["moments"] = former.view(256, 256).view(torch.uint8)
    optimizer.load_state_dict(saved)
    state = optimizer.state[parameter]
    assert set(state) == {"step", "packed_moments"}
    now = state["packed_moments"].view(torch.int16).flatten()
    back_v = unpack(now, RATIO_STEP)[1]
    assert torch.equal(now & 127, former & 127)
    levels = unpack((torch.arange(512) << 7).to(torch.int16), RATIO_STEP)[1].double()
    nearest = (levels[None, :] - v[:, None]).abs().min(1).values
    assert torch.equal((back_v.double() - v).abs(), nearest)


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60),
    st.floats(0.0, 0.97),
    st.floats(0.0, 0.999),
)
@settings(max_examples=200, deadline=None)
def test_the_ratio_of_the_moments_is_bounded(gradients: list[float], beta_1: float, beta_2: float) -> None:
    beta_2 = max(beta_2, beta_1**2 + 1e-3)
    m = v = 0.0
    for g in gradients:
        m, v = beta_1 * m + (1 - beta_1) * g, beta_2 * v + (1 - beta_2) * g * g
        assert abs(m) <= ratio_bound(beta_1, beta_2) * math.sqrt(v) * (1 + 1e-9) + 1e-30


def adamw(start: Tensor, gradients: list[Tensor], lr: float, weight_decay: float = 0.0) -> Tensor:
    """AdamW from its formulas, in float64."""
    x, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for t, g in enumerate(gradients, 1):
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g.double(), BETAS[1] * v + (1 - BETAS[1]) * g.double() ** 2
        x = x * (1 - lr * weight_decay) - lr * m / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)).sqrt() + 1e-8)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_it_is_adamw(dtype: torch.dtype, decay: float) -> None:
    """Gradients over ten decades, as those of gates that are shut and of gates that are not: one bad scale shows."""
    torch.manual_seed(0)
    start = (torch.randn(64, 96) * 0.04).to(dtype)
    scale = 10 ** (torch.rand(64, 96) * 8 - 8)
    gradients = [((torch.randn(64, 96) + 0.5) * scale).to(dtype) for _ in range(60)]
    parameter = nn.Parameter(start.clone())
    optimizer = PackedAdamW([parameter], lr=1e-3, weight_decay=decay)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    moved, exact = parameter.detach().double() - start.double(), adamw(start, gradients, 1e-3, decay) - start.double()
    assert float((moved * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=0.02)
    assert float((moved - exact).norm() / exact.norm()) < 0.12
    assert float((moved - exact).abs().max()) < 0.012  # of 60 steps of 1e-3


def test_weights_decay_by_the_rate_times_the_decay() -> None:
    parameter = nn.Parameter(torch.ones(4, 8))
    optimizer = PackedAdamW([parameter], lr=0.1, weight_decay=0.5)
    for steps in (1, 2):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), torch.full((4, 8), 0.95**steps))


def test_the_first_step_is_exact() -> None:
    """From nothing, m/√v is ±1 but for ε, whatever the gradient."""
    parameter = nn.Parameter(torch.zeros(1, 4))
    parameter.grad = torch.tensor([[3.0, -1e-4, 1e-6, 0.0]])
    PackedAdamW([parameter], lr=1.0).step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([[-1.0, 1.0, -0.99, 0.0]]), atol=1e-2, rtol=0)


def test_small_updates_are_lost_to_the_nearest_and_not_here() -> None:
    """1000 steps of 1e-5 where a bfloat16 has steps of 2.4e-4."""
    start = torch.full((64, 64), 0.04, dtype=torch.bfloat16)
    moved = {}
    for kind in (torch.optim.AdamW, PackedAdamW):
        parameter = nn.Parameter(start.clone())
        optimizer = kind([parameter], lr=1e-5, betas=BETAS, weight_decay=0.0)
        for _ in range(1000):
            parameter.grad = torch.full_like(parameter, 1e-3)
            optimizer.step()
        moved[kind] = (start.double() - parameter.detach().double()).mean()
    assert float(moved[torch.optim.AdamW]) == 0
    assert float(moved[PackedAdamW]) == pytest.approx(0.01, rel=0.02)


def test_bytes() -> None:
    """Of a logit, its gradient and the optimizer's state, whatever the shape: exactly six."""
    for shape in [(33, 47), (5, 3, 7), (4096,)]:
        parameter = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
        parameter.grad = torch.ones_like(parameter)
        optimizer = PackedAdamW([parameter])
        optimizer.step()
        state = [value for value in optimizer.state[parameter].values() if value.ndim]
        tensors = [parameter, parameter.grad, *state]
        assert sum(tensor.nbytes for tensor in tensors) == 6 * parameter.numel()


def test_a_step_after_saving_is_the_step_without() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(8, 24).bfloat16() for _ in range(6)]
    ends = []
    for stop in (None, 3):
        parameter = nn.Parameter(torch.full((8, 24), 0.04, dtype=torch.bfloat16))
        optimizer = PackedAdamW([parameter])
        for place, gradient in enumerate(gradients):
            if place == stop:
                saved = optimizer.state_dict()
                torch.manual_seed(place)  # no generator has a part in it
                parameter = nn.Parameter(parameter.detach().clone())
                optimizer = PackedAdamW([parameter])
                optimizer.load_state_dict(saved)
            parameter.grad = gradient
            optimizer.step()
        ends.append((parameter.detach(), optimizer.state[parameter]["packed_moments"]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_loading_converts_no_moments() -> None:
    """To the parameter's data type they would be two to four times as large, all at once."""
    made: list[Tensor] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            made.extend(one for one in tree_leaves(result) if isinstance(one, Tensor))
            return result

    parameter = nn.Parameter(torch.ones(8, 24))
    optimizer, other = PackedAdamW([parameter]), PackedAdamW([parameter])
    parameter.grad = torch.ones(8, 24)
    optimizer.step()
    saved = optimizer.state_dict()
    with Watch():
        other.load_state_dict(saved)
    assert max(one.nbytes for one in made) == 2 * parameter.numel()
    assert torch.equal(other.state[parameter]["packed_moments"], optimizer.state[parameter]["packed_moments"])


def test_parameters_of_equal_shape_round_apart() -> None:
    parameters = [nn.Parameter(torch.full((64, 64), 0.04, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = PackedAdamW(parameters, lr=1e-4)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    one, other = (parameter.detach() == 0.04 for parameter in parameters)
    assert 0.3 < float((parameters[0] == parameters[1]).float().mean()) < 0.7, (one, other)


def test_words_are_one_call_where_they_are_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device; on a CPU the parts fit the caches, and without a compiler the temporaries are that small."""
    large = torch.empty(1 << 24, device="meta")
    for compiles, words, elements in ((True, True, 1 << 24), (True, False, 1 << 22), (False, True, 1 << 22)):
        monkeypatch.setattr(optimizers, "can_compile", lambda device, compiles=compiles: compiles)
        assert optimizers._elements_a_call(large, words) == elements
    assert optimizers._elements_a_call(torch.empty(1 << 21), True) == 1 << 20
