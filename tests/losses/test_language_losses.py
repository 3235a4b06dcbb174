"""The LM and distillation losses against the models' own and against their formulas, written out in float64."""

import warnings
from typing import Any

import pytest
import torch
from tiny import FAMILIES, VOCABULARY, tiny_model
from torch import Tensor

from benchmarks import references
from leap_pl.base_model.backbone import split_model
from leap_pl.losses.language import language_losses
from leap_pl.losses.objective import Objective

IDS = torch.randint(0, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(5))


def predicted(hidden: Tensor) -> Tensor:
    return hidden[:, :-1].flatten(0, 1)


def targets_of(ids: Tensor) -> Tensor:
    return ids[:, 1:].reshape(-1)


# -- equal to the model's own -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_loss(family: str) -> None:
    """Soft-capped logits (Gemma) and scaled ones (Granite) included; the gradients of embeddings and head too."""
    model = tiny_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        states, head = split_model(model)
    ends = {module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())}  # one, if tied
    model.requires_grad_(False)
    assert head.learned() == []
    for weight in ends:
        weight.requires_grad_(True)
    expected = model(input_ids=IDS, labels=IDS).loss
    expected_grads = torch.autograd.grad(expected, list(ends))
    states_T, targets_T = predicted(states(IDS)), targets_of(IDS)
    loss, lm, kl = language_losses(states_T, targets_T, head, Objective(chunk=7), learned=head.learned())
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(loss.detach(), lm)
    assert kl == 0
    assert model(input_ids=IDS).logits.std() > 0.1  # no constant network
    for weight, expected_grad in zip(ends, expected_grads, strict=True):
        torch.testing.assert_close(weight.grad, expected_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "change"), [
    ("gemma3", {"final_logit_softcapping": None}),
    ("granite", {"logits_scaling": 1.0}),
])  # fmt: skip
def test_caps_and_scales_make_a_difference(family: str, change: dict[str, object]) -> None:
    """What the test above tells apart."""
    losses = [
        language_losses(predicted(states(IDS)), targets_of(IDS), head, Objective())[0]
        for states, head in (split_model(tiny_model(family)), split_model(tiny_model(family, **change)))
    ]
    assert abs(losses[0] - losses[1]) > 0.01


# -- equal to the formulas --------------------------------------------------------------------------------

MIXES = {
    "lm": Objective(lm=1.0),
    "lm, weighted": Objective(lm=0.3),
    "distillation, temperature 1": Objective(lm=0.0, distillation=1.0),
    "distillation, temperature 2.5": Objective(lm=0.0, distillation=0.7, temperature=2.5),
    "mixed, temperature 1": Objective(lm=0.4, distillation=1.6),
    "mixed, temperature 2.5": Objective(lm=1.5, distillation=0.5, temperature=2.5),
}


def problem(tokens: int = 23, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, targets, a head's weight and the teacher's hidden states."""
    g = torch.Generator().manual_seed(11)
    hidden, teacher = (torch.randn(tokens, 8, generator=g).to(dtype) for _ in range(2))
    return hidden, torch.randint(0, 31, (tokens,), generator=g), torch.randn(31, 8, generator=g).to(dtype), teacher


def with_chunk(objective: Objective, chunk: int) -> Objective:
    return Objective(**{**vars(objective), "chunk": chunk})


@pytest.mark.parametrize("chunk", [1, 5, 23, 512])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("capped", [False, True])
def test_values_and_gradients_against_float64(mix: str, chunk: int, capped: bool) -> None:
    objective = with_chunk(MIXES[mix], chunk)
    hidden, targets, weight, teacher = problem()
    distils = objective.distillation > 0

    def head(x: Tensor) -> Tensor:
        z = x @ weight.to(x.dtype).T
        return 3 * torch.tanh(z / 3) if capped else z

    def dense_head(x: Tensor) -> Tensor:
        return head(x).detach() * 0.5

    hidden64, weight64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    teacher64 = dense_head(teacher.double()) if distils else None
    weight, float32 = weight64, weight
    ce, kl = references.language_losses(head(hidden64), targets, teacher64, objective.temperature)
    (2.5 * (objective.lm * ce + objective.distillation * kl)).backward()

    weight = float32.requires_grad_()
    hidden.requires_grad_()
    given = teacher if distils else None
    found = language_losses(hidden, targets, head, objective, given, dense_head, [weight])
    (2.5 * found[0]).backward()
    assert [x.dtype for x in found] == [torch.float32] * 3
    assert [x.requires_grad for x in found] == [True, False, False]
    expected = (objective.lm * ce + objective.distillation * kl, ce, kl)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.detach().double(), y.detach(), rtol=2e-6, atol=1e-6)
    for x, y in ((hidden, hidden64), (weight, weight64)):
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-6)


def test_a_token_that_both_models_rule_out_adds_nothing() -> None:
    """With logits of −∞, as of tokens that a model never writes."""
    hidden, targets, weight, teacher = problem()
    targets = targets.clamp_max(29)
    objective = Objective(lm=0.0, distillation=1.0, temperature=0.5)

    def of(x: Tensor) -> Tensor:
        logits = x @ weight.T
        return torch.cat([logits[:, :-1], torch.full_like(logits[:, -1:], -torch.inf)], -1)

    found, expected = [], []
    for head, told in ((of, found), (lambda x: (x @ weight.T)[:, :-1], expected)):
        states = hidden.clone().requires_grad_()
        loss, lm, kl = language_losses(states, targets, head, objective, teacher, head)
        loss.backward()
        told += [loss.detach(), lm, kl, states.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_teacher_that_agrees_gives_no_loss_and_no_gradient() -> None:
    hidden, targets, weight, _ = problem()
    hidden.requires_grad_()
    objective = Objective(lm=0.0, distillation=1.0, temperature=2.0)
    loss, lm, kl = language_losses(hidden, targets, lambda x: x @ weight.T, objective, hidden.detach())
    loss.backward()
    assert loss.abs() < 1e-6
    assert kl.abs() < 1e-6
    assert lm > 1  # measured though it has no weight
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-7


@pytest.mark.parametrize("mix", MIXES)
def test_bfloat16_hidden_states(mix: str) -> None:
    """Softmaxes and sums are float32; only hidden states, logits and their gradient are rounded."""
    objective = with_chunk(MIXES[mix], 7)
    hidden, targets, weight, teacher = problem(dtype=torch.bfloat16)
    teacher_or_none = teacher if objective.distillation else None
    hidden.requires_grad_()
    loss, lm, _ = language_losses(hidden, targets, lambda x: x @ weight.T, objective, teacher_or_none)
    loss.backward()
    hidden64 = hidden.detach().double().requires_grad_()
    teacher64 = (teacher @ weight.T).double() if objective.distillation else None
    ce, kl = references.language_losses(hidden64 @ weight.double().T, targets, teacher64, objective.temperature)
    (objective.lm * ce + objective.distillation * kl).backward()
    assert loss.dtype == lm.dtype == torch.float32
    torch.testing.assert_close(lm.double(), ce.detach(), rtol=1e-2, atol=1e-2)
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    assert (hidden.grad.double() - hidden64.grad).norm() < 0.02 * hidden64.grad.norm()


def test_an_accumulated_gradient_is_scaled_before_it_is_rounded() -> None:
    """A third in bfloat16 is .2% too large, in every element."""
    objective = with_chunk(MIXES["lm"], 7)
    grads = []
    for share in (1.0, 1 / 3):
        hidden, targets, weight, _ = problem(dtype=torch.bfloat16)
        hidden.requires_grad_()
        loss, _, _ = language_losses(hidden, targets, lambda x, head=weight: x @ head.T, objective, None)
        (share * loss).backward()
        assert hidden.grad is not None
        grads.append(hidden.grad.double())
    whole, third = grads
    assert float((whole * third).sum() / (whole * whole).sum()) == pytest.approx(1 / 3, rel=5e-4)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("dtype", "late"), [(torch.float16, False), (torch.float16, True), (torch.float32, False)])
def test_float16_gradients_are_scaled_in_time(mix: str, dtype: torch.dtype, late: bool) -> None:
    """As a scaler of losses does it: by more than the largest number of float16, and of logits of many tokens."""
    objective, g = with_chunk(MIXES[mix], 512), torch.Generator().manual_seed(3)
    hidden, teacher = (torch.randn(2048, 16, generator=g).to(dtype) for _ in range(2))
    weight, targets = torch.randn(4000, 16, generator=g).half() / 8, torch.randint(0, 4000, (2048,), generator=g)
    hidden.requires_grad_()
    weight.requires_grad_()

    def head(x: Tensor) -> Tensor:
        logits = x.half() @ weight.T  # as autocast computes it
        return logits.float() if late else logits

    given = teacher if objective.distillation else None
    loss = language_losses(hidden, targets, head, objective, given, learned=[weight])[0]
    (loss * 65536.0).backward()
    assert weight.grad is not None
    of_weight = weight.grad.double() / 65536.0
    hidden.grad = None
    loss = language_losses(hidden, targets, head, objective, given)[0]
    (loss * 65536.0 * 4).backward()
    hidden64, weight64 = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    teacher64 = head(teacher).detach().double() if objective.distillation else None
    ce, kl = references.language_losses(hidden64 @ weight64.T, targets, teacher64, objective.temperature)
    (objective.lm * ce + objective.distillation * kl).backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype
    difference = hidden.grad.double() / (65536.0 * 4) - hidden64.grad
    assert difference.norm() < 2e-3 * hidden64.grad.norm()
    assert (of_weight - weight64.grad).norm() < 5e-3 * weight64.grad.norm()


@pytest.mark.parametrize("mix", ["lm", "mixed, temperature 2.5"])
@pytest.mark.parametrize("grad", [True, False])
def test_logits_exist_for_one_chunk_at_a_time(mix: str, grad: bool) -> None:
    """The head is asked for ``chunk`` rows at most, once a token (twice with a teacher), and nothing is kept."""
    objective = with_chunk(MIXES[mix], 4)
    hidden, targets, weight, teacher = problem(tokens=23)
    rows: list[int] = []

    def head(x: Tensor) -> Tensor:
        rows.append(len(x))
        return x @ weight.T

    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.set_grad_enabled(grad):
        language_losses(hidden.requires_grad_(grad), targets, head, objective, teacher if mix != "lm" else None)
    assert max(rows) == 4
    assert sum(rows) == 23 * (1 if mix == "lm" else 2)
    assert max(sizes, default=0) <= max(hidden.numel(), weight.numel(), 4 * 31)


def test_without_gradient() -> None:
    hidden, targets, weight, teacher = problem()
    with torch.no_grad():
        loss, _, kl = language_losses(hidden, targets, lambda x: x @ weight.T, Objective(distillation=1.0), teacher)
    assert not loss.requires_grad
    assert kl > 0


def test_large_logits_stay_finite() -> None:
    hidden, targets, weight, teacher = problem()
    hidden = (hidden * 1000).requires_grad_()
    loss, *_ = language_losses(hidden, targets, lambda x: x @ weight.T, Objective(distillation=1.0), teacher * 1000)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_the_backward_pass_is_not_within_autocast() -> None:
    """It runs within the forward pass, and would compute what that kept from autocast in half precision after all."""
    within = {}

    class Head(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x_CD: Tensor) -> Tensor:
            within["forward"] = torch.is_autocast_enabled("cpu")
            return x_CD * 2

        @staticmethod
        def backward(ctx: Any, grad_CD: Tensor) -> Tensor:
            within["backward"] = torch.is_autocast_enabled("cpu")
            return grad_CD * 2

    hidden = torch.randn(6, VOCABULARY, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, *_ = language_losses(hidden, torch.arange(6), Head.apply, Objective(chunk=4))
    loss.backward()
    assert within == {"forward": True, "backward": False}
    assert hidden.grad is not None
