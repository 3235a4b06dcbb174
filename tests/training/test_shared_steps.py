"""Steps that rows and columns take together, against three parameters that are added up."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from python_runs import data, trainer
from torch import Tensor, nn

from leap_pl import LeapModule
from leap_pl.errors import UserError
from leap_pl.kernels.compiled import can_compile
from leap_pl.prior import Prior
from leap_pl.training import shared_steps
from leap_pl.training.clipping import clip_by_norm
from leap_pl.training.optimizers import PackedAdamW, SharedAdamW
from leap_pl.training.shared_steps import SharedSteps

pytestmark = pytest.mark.usefixtures("eager")

BETAS = (0.9, 0.95)


def gradients(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[Tensor]:
    """Noise, and for each row and column a mean of its own."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(*shape[:-1], 1, generator=generator)
    column = torch.randn(*shape[:-2], 1, shape[-1], generator=generator)
    return [torch.randn(shape, generator=generator) + 0.3 * row + 0.2 * column for _ in range(steps)]


def by_hand(start: Tensor, grads: list[Tensor], lr: float, rows: float, columns: float) -> Tensor:
    """θ = e + r + c in float64: Adam for e element by element, for r and c by the root mean square of all sums."""
    e = start.double().clone()
    r = torch.zeros(*start.shape[:-1], 1, dtype=torch.float64)
    c = torch.zeros(*start.shape[:-2], 1, start.shape[-1], dtype=torch.float64)
    parts = [(e, None, 1.0), (r, -1, rows), (c, -2, columns)]
    means = [torch.zeros_like(part) for part, *_ in parts]
    squares: list[Any] = [torch.zeros_like(e), 0.0, 0.0]
    for t, grad in enumerate(grads, 1):
        for k, (part, dim, rate) in enumerate(parts):
            g = grad.double() if dim is None else grad.double().sum(dim, keepdim=True)
            means[k] = BETAS[0] * means[k] + (1 - BETAS[0]) * g
            squares[k] = BETAS[1] * squares[k] + (1 - BETAS[1]) * (g * g if dim is None else float((g * g).mean()))
            root = (torch.as_tensor(squares[k]) / (1 - BETAS[1] ** t)).sqrt() + 1e-8
            part -= lr * rate * means[k] / (1 - BETAS[0] ** t) / root
    return e + r + c


@pytest.mark.parametrize("shape", [(6, 10), (3, 4, 5)])
@pytest.mark.parametrize(("rows", "columns"), [(0.5, 0.25), (0.5, 0.0), (0.0, 2.0), (0.0, 0.0)])
@pytest.mark.parametrize("fused", [True, False])
def test_three_parameters_that_are_added_up(shape: tuple[int, ...], rows: float, columns: float, fused: bool) -> None:
    grads = gradients(shape, 7)
    parameter = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    expected = by_hand(parameter.detach(), grads, 1e-2, rows, columns)
    optimizer = SharedAdamW([parameter], lr=1e-2, betas=BETAS, fused=fused, rows=rows, columns=columns)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_without_shared_steps_it_is_adamw() -> None:
    first, second = (nn.Parameter(torch.zeros(4, 6)) for _ in range(2))
    ours = SharedAdamW([first], lr=1e-2, betas=BETAS, rows=0, columns=0)
    theirs = torch.optim.AdamW([second], lr=1e-2, betas=BETAS, weight_decay=0.0, fused=True)
    for grad in gradients((4, 6), 4):
        first.grad, second.grad = grad.clone(), grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(first, second)
    assert set(ours.state[first]) == set(theirs.state[second])


@pytest.mark.parametrize("make", [partial(SharedAdamW, fused=True), partial(SharedAdamW, fused=False), PackedAdamW])
def test_clipped_gradients_are_what_is_summed(make: Any) -> None:
    """ε far above the gradients takes Adam its adaptive scale, so that a step is in proportion to them."""
    moved = []
    for limit in (1.0, 0.25):
        parameter = nn.Parameter(torch.zeros(3, 4))
        optimizer = make([parameter], lr=1.0, betas=(0.0, 0.5), eps=1e3, rows=1.0, columns=1.0)
        parameter.grad = torch.full((3, 4), 2.0)
        clip_by_norm(optimizer, [parameter], limit, torch.linalg.vector_norm(parameter.grad))
        optimizer.step()
        moved.append(parameter.detach().clone())
    torch.testing.assert_close(moved[0] / moved[1], torch.full((3, 4), 4.0), rtol=2e-2, atol=0)
    # e gets the gradient, r the sum of 4, c the sum of 3.
    clipped = 1 / math.sqrt(12)
    torch.testing.assert_close(moved[0], torch.full((3, 4), -clipped * (1 + 4 + 3) / 1e3), rtol=2e-2, atol=0)


def test_only_groups_that_ask_for_it() -> None:
    masks, weights = (nn.Parameter(torch.zeros(3, 4)) for _ in range(2))
    optimizer = SharedAdamW(
        [{"params": [masks]}, {"params": [weights], "rows": 0.0, "columns": 0.0}], lr=1e-2, rows=0.5, columns=0.5
    )
    for parameter in (masks, weights):
        parameter.grad = torch.ones(3, 4)
    optimizer.step()
    torch.testing.assert_close(masks.detach(), torch.full((3, 4), -2e-2))
    torch.testing.assert_close(weights.detach(), torch.full((3, 4), -1e-2))
    assert "rows_mean" not in optimizer.state[weights]


def test_weights_that_are_trained_with_a_mask_take_steps_alone(model_folder: Path, text_file: Path) -> None:
    module = LeapModule(
        str(model_folder),
        dtype="float32",
        prior=Prior(method="none"),
        optimizer=partial(SharedAdamW, lr=1e-3, rows=0.5, columns=0.25),
        train_weights="kept",
    )
    run = trainer(max_steps=1)
    run.fit(module, data(text_file))
    (optimizer,) = run.optimizers
    assert [(group["rows"], group["columns"]) for group in optimizer.param_groups] == [(0.5, 0.25), (0.0, 0.0)]
    masks, weights = (group["params"] for group in optimizer.param_groups)
    assert all("rows_mean" in optimizer.state[logits] for logits in masks)
    assert not any("rows_mean" in optimizer.state[weight] for weight in weights)


@pytest.mark.parametrize("make", [SharedAdamW, PackedAdamW])
def test_a_state_that_is_saved_goes_on(make: Any) -> None:
    grads = gradients((5, 8), 6)
    dtype = torch.bfloat16 if make is PackedAdamW else torch.float32
    whole, halves = (nn.Parameter(torch.zeros(5, 8, dtype=dtype)) for _ in range(2))
    settings = {"lr": 1e-2, "rows": 0.5, "columns": 0.5}
    one, first = make([whole], **settings), make([halves], **settings)
    for number, grad in enumerate(grads):
        if number == 3:
            stored = first.state_dict()
            first = make([halves], **settings)
            first.load_state_dict(stored)
        for optimizer, parameter in ((one, whole), (first, halves)):
            parameter.grad = grad.to(dtype)
            optimizer.step()
    assert torch.equal(whole, halves)


def test_bfloat16_is_rounded_with_the_exact_mean() -> None:
    """Shared steps far below the distance of two bfloat16 numbers move the mean of many by what they are."""
    parameter = nn.Parameter(torch.full((64, 512), 0.04, dtype=torch.bfloat16))
    before = float(parameter.detach().double().mean())
    optimizer = PackedAdamW([parameter], lr=1e-5, rows=1.0, columns=2.0)
    for _ in range(4):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert float(parameter.detach().double().mean()) - before == pytest.approx(-4 * 4e-5, rel=0.03)


def test_every_shared_step_rounds_other_elements() -> None:
    """In every step, of every parameter and of every expert in a stack: equal bits would be a bias of their own."""
    parameters = [nn.Parameter(torch.full((2, 64, 64), 0.04, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = PackedAdamW(parameters, lr=1e-6, rows=50.0)
    moved = []
    for _ in range(2):
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved += [part for now, was in zip(parameters, before, strict=True) for part in (now.detach() != was).unbind()]
    assert all(0.05 < float(each.float().mean()) < 0.95 for each in moved)
    for index, one in enumerate(moved):
        for other in moved[index + 1 :]:
            assert float((one == other).float().mean()) < 0.95


def test_stacked_experts_of_bfloat16_have_rows_of_their_own() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3, 4, dtype=torch.bfloat16))
    optimizer = PackedAdamW([parameter], lr=1e-2, rows=1.0)
    grad = torch.zeros(2, 3, 4)
    grad[1, 2] = 1.0
    parameter.grad = grad.bfloat16()
    optimizer.step()
    moved = parameter.detach().float()
    assert moved[1, 2].max() < -1e-2
    assert not moved[0].any()


def test_compiled_and_not_are_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bfloat16 parameters of several shapes, by one kernel: bit for bit, in parts as at once."""
    monkeypatch.delenv("LEAP_PL_COMPILE", raising=False)
    if not can_compile(torch.device("cpu")):
        pytest.skip("torch.compile does not work here")

    def moved(shape: tuple[int, ...]) -> Tensor:
        parameter = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(2)).mul(0.04).bfloat16())
        optimizer = SharedSteps(torch.optim.SGD([parameter]), None)
        optimizer.optimizer.state[parameter]["step"] = torch.tensor(3.0)
        draw = torch.Generator().manual_seed(4)
        row = torch.randn(*shape[:-1], 1, generator=draw) * 1e-4
        column = torch.randn(*shape[:-2], 1, shape[-1], generator=draw) * 1e-4
        optimizer._add(parameter, {"rows": row, "columns": column}, {"seed": 5}, 1)
        return parameter.detach()

    for shape in ((160, 71), (33, 72), (5, 48, 64), (7, 8), (1, 24), (40, 3), (12, 12), (9, 31), (64, 640), (2, 3, 5)):
        compiled = moved(shape)
        with monkeypatch.context() as patch:
            patch.setattr(shared_steps, "CHUNK", 256)
            assert torch.equal(moved(shape), compiled)
            patch.setenv("LEAP_PL_COMPILE", "0")
            assert torch.equal(moved(shape), compiled)


def test_numbers_that_make_no_sense() -> None:
    for make in (SharedAdamW, PackedAdamW):
        for wrong in ({"rows": -1.0}, {"columns": -0.5}):
            with pytest.raises(UserError, match=rf"{make.__name__}: rows is .* and columns is .*; give 0 or more"):
                make([nn.Parameter(torch.zeros(2, 2))], **wrong)


def test_a_step_that_the_gradient_scaler_skips_is_skipped_whole() -> None:
    """Under 16-mixed an infinite gradient takes no step, of logits, rows or columns."""
    parameter = nn.Parameter(torch.zeros(3, 4))
    optimizer: Any = SharedAdamW([parameter], lr=1e-2, betas=BETAS, fused=True)
    first, second = gradients((3, 4), 2)
    parameter.grad = first
    optimizer.step()

    def state() -> list[Tensor]:
        return [parameter.detach().clone(), *(x.clone() for x in optimizer.state[parameter].values())]

    before = state()
    parameter.grad = second.clone()
    parameter.grad[1, 2] = math.inf
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(before, state(), strict=True))
