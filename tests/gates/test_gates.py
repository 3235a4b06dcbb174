"""Bernoulli gates by themselves: the formula and its gradients against float64, noise, and compiled kernels."""

import warnings
from typing import Any

import pytest
import torch
from bare_gates import gate_of, noise_of, state_at
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.torch_version import TorchVersion

from leap_pl.gates import BernoulliGate, Gate, Gates
from leap_pl.kernels import compiled as compiling
from leap_pl.masks.patterns import Unstructured

pytestmark = pytest.mark.usefixtures("eager")  # compiling takes its time; one test below does

ANNEALED = [(25.0, 4.0), (0.0, 1.0), (100.0, 1.0), (350.0, 0.05)]


# -- the formula ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("alpha", "tau"), ANNEALED)
@pytest.mark.parametrize("outputs", ["all", "weight", "kept", "energy"])
def test_values_and_gradients_against_float64(dtype: torch.dtype, alpha: float, tau: float, outputs: str) -> None:
    """M = σ((αθ + g)/τ) written out, and its gradient by autograd, for random upstream gradients."""
    random = torch.Generator().manual_seed(1)
    gate = gate_of((3, 17, 5), state=state_at(alpha, tau, seed=2, step=7, micro_batch=1))
    weight = torch.randn(gate.shape, generator=random).to(dtype)
    with torch.no_grad():
        gate.logits.copy_(torch.randn(gate.shape, generator=random) * 0.05)
    upstream = torch.randn(gate.shape, generator=random).to(dtype)
    a, b = (torch.randn((), generator=random).item() for _ in range(2))
    use = {k: float(outputs in ("all", k)) for k in ("weight", "kept", "energy")}

    masked = gate(weight)
    assert gate.kept is not None
    loss = a * use["kept"] * gate.kept + b * use["energy"] * gate.energy
    if use["weight"]:
        loss = loss + (masked * upstream).sum().float()
    loss.backward()

    theta = gate.logits.detach().double().requires_grad_()
    mask = torch.sigmoid((alpha * theta + noise_of(gate)) / tau)
    expected = mask * weight.double()
    (
        use["weight"] * (expected * upstream.double()).sum()
        + a * use["kept"] * mask.sum()
        + b * use["energy"] * (expected**2).sum()
    ).backward()

    assert masked.dtype == dtype
    assert masked.shape == gate.shape
    assert gate.kept.dtype == gate.energy.dtype == torch.float32
    rounding = {torch.float32: 2e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(masked.double(), expected.detach(), rtol=rounding, atol=1e-6)
    torch.testing.assert_close(gate.kept.double(), mask.sum().detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gate.energy.double(), (expected**2).sum().detach(), rtol=1e-5, atol=0)
    assert gate.logits.grad is not None
    assert theta.grad is not None
    assert gate.logits.grad.dtype == torch.float32
    assert (gate.logits.grad.double() - theta.grad).abs().max() <= 2e-5 * theta.grad.abs().max()
    assert bool(theta.grad.any()) == (alpha != 0)


def test_the_weight_gets_no_gradient() -> None:
    gate, weight = gate_of((4, 4)), torch.randn(4, 4, requires_grad=True)
    gate(weight).sum().backward()
    assert weight.grad is None


@pytest.mark.parametrize("alpha", [25.0, 350.0])
def test_without_temperature_the_mask_is_hard(alpha: float) -> None:
    """τ → 0: one where αθ + g > 0, else zero; sums to match, and no gradient left."""
    gate = gate_of((60, 70), state=state_at(alpha, 1e-9))
    gate.start_from(None, seed=0)
    weight = torch.randn(60, 70)
    masked = gate(weight)
    hard = alpha * gate.logits.detach().double() + noise_of(gate) > 0
    assert 0.3 < hard.double().mean() < 0.7
    assert torch.equal(masked, torch.where(hard, weight, 0.0))
    assert gate.kept == hard.sum()
    torch.testing.assert_close(gate.energy, weight[hard].square().sum())
    (masked.sum() + gate.kept + gate.energy).backward()
    assert gate.logits.grad is not None
    assert not gate.logits.grad.any()


@pytest.mark.parametrize("tau", [0.05, 1.0, 4.0])
def test_without_scale_the_density_is_one_half(tau: float) -> None:
    """α = 0: whatever the logits are. (One Gumbel instead of the logistic would give .53 to .63.)"""
    gate = gate_of((400, 500), state=state_at(0.0, tau))
    gate.start_from(torch.ones(400, 500, dtype=torch.bool), seed=0)
    gate(torch.ones(400, 500))
    assert gate.kept is not None
    assert abs(gate.kept.item() / gate.logits.numel() - 0.5) < 4 * 0.5 / 200_000**0.5


def test_fresh_noise_for_every_seed_step_micro_batch_and_tensor() -> None:
    def mask(name: str = "w", **kw: int) -> Tensor:
        gate = gate_of((8, 8), name=name, state=state_at(25.0, 4.0, **kw))
        return gate(torch.ones(8, 8)).detach()

    masks = [mask(), mask(seed=1), mask(step=1), mask(micro_batch=1), mask(name="v")]
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            assert (one != other).float().mean() > 0.9
    assert torch.equal(mask(), masks[0])


def test_annealing_between_forward_and_backward_changes_nothing() -> None:
    """And neither does the state of the noise."""
    found = []
    for disturb in (False, True):
        state = state_at(100.0, 1.0)
        gate = gate_of((8, 8), state=state)
        loss = gate(torch.ones(8, 8)).square().sum()
        if disturb:
            state.anneal(350.0, 0.05)
            state.step, state.micro_batch, state.seed = 5, 1, 9
        loss.backward()
        found.append(gate.logits.grad)
    assert torch.equal(found[0], found[1])


def test_settings_that_make_no_sense() -> None:
    for wrong in ({"spread": 0.0}, {"spread": -1.0}, {"strength": -1.0}):
        with pytest.raises(ValueError, match=r"^model\.gate\.(spread|strength|pattern_spread) is .*; give "):
            gate_of((2, 2), **wrong)
    assert gate_of((2, 2), spread=0.1, strength=2.0).settings() == {"spread": 0.1, "strength": 2.0}


# -- compiled ---------------------------------------------------------------------------------------------


def test_compiled_kernels_are_the_eager_ones_and_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, at odd lengths, while α, τ and the keys change."""
    monkeypatch.delenv("LEAP_PL_COMPILE")
    if not compiling.can_compile(torch.device("cpu")):
        pytest.skip("torch.compile does not work here")

    def run(shape: tuple[int, ...], step: int, alpha: float, tau: float) -> list[Tensor]:
        gate = gate_of(shape, name=f"w{shape}", state=state_at(alpha, tau, step=step, seed=step))
        gate.start_from(None, seed=0)
        random = torch.Generator().manual_seed(step)
        masked = gate(torch.randn(shape, generator=random))
        assert gate.kept is not None
        assert masked.shape == shape
        upstream = torch.randn(shape, generator=random)
        ((masked * upstream).sum() + 0.3 * gate.kept + 0.7 * gate.energy).backward()
        assert gate.logits.grad is not None
        return [masked.detach(), gate.kept.detach(), gate.energy.detach(), gate.logits.grad]

    # Square, not square, stacked, odd. Small ones, those of one row, and those of more than 4096 columns have kernels
    # of their own, compiled apart.
    shapes = [(80, 80), (129, 257), (3, 41, 67), (20, 1007), (300, 1000), (576, 576), (80, 80)]
    small = [(8, 8), (3, 3), (7, 31), (2, 5, 13), (1, 1023), (2, 10_007)]
    cases = [(s, i, *ANNEALED[i % len(ANNEALED)]) for i, s in enumerate(shapes)]
    run((4, 5), 0, *ANNEALED[0])
    torch._dynamo.reset()  # a square weight is first: its two sizes are equal by chance, at whichever compilation
    found = [run(*cases[0])]
    assert {"mask_forward[cpu]", "mask_backward[cpu]"} <= set(compiling.compile_seconds())
    with torch._dynamo.config.patch(error_on_recompile=True):
        found += [run(*case) for case in cases[1:]]
    cases += [(s, i, *ANNEALED[i % len(ANNEALED)]) for i, s in enumerate(small)]
    found += [run(*case) for case in cases[len(found) :]]
    monkeypatch.setenv("LEAP_PL_COMPILE", "0")
    for case, results in zip(cases, found, strict=True):
        for compiled, expected in zip(results, run(*case), strict=True):
            scale = expected.abs().max().item()
            torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5 * scale)


def test_compiled_passes_are_two_loops_over_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the noise, over rows and columns, and one for what follows: in one, a pass takes a third longer."""
    if TorchVersion(torch.__version__) < "2.13":
        pytest.skip("torch 2.11 makes one loop of the backward pass, which computes the same in more time")
    monkeypatch.delenv("LEAP_PL_COMPILE")
    if not compiling.can_compile(torch.device("cpu")):
        pytest.skip("torch.compile does not work here")

    def forward_and_backward() -> None:
        gate = gate_of((300, 1000), name="two loops")
        gate(torch.ones(300, 1000, dtype=torch.bfloat16)).sum().backward()

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        _, passes = run_and_get_code(forward_and_backward)
    assert [code.count("for(int64_t") for code in passes] == [3, 3]


def test_without_a_compiler_the_gates_say_so_once_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("\nno C++ compiler\nand more")

    monkeypatch.delenv("LEAP_PL_COMPILE")
    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(compiling, "_backends", {})
    with pytest.warns(UserWarning, match=r"uncompiled.*\(no C\+\+ compiler\)"):
        assert not compiling.can_compile(torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not compiling.can_compile(torch.device("cpu"))
        assert gate_of((2, 2))(torch.ones(2, 2)).shape == (2, 2)


# -- what all gates of a model say together, at a sparsity other than one half ------------------------------


def two_gates() -> Any:
    generator = torch.Generator().manual_seed(4)
    gates = {name: gate_of((5, 8), name=name) for name in ("a", "b")}
    for gate in gates.values():
        gate.logits.data.copy_(torch.randn(5, 8, generator=generator) - 0.7)
    return Gates.of(gates)


def test_samples_of_hard_masks_keep_what_the_sparsity_leaves() -> None:
    gates = two_gates()
    samples = gates.sample_hard_masks(0.7, 1)
    assert sum(int(sample.sum()) for sample in samples.values()) == 24
    gates.choose(0.7)
    for name, gate in gates.items():
        assert torch.equal(samples[name], gate.hard_mask().flatten())
    assert int(torch.cat([*gates.sample_hard_masks(0.7, 2).values()]).sum()) == 12


def test_the_share_of_logits_above_zero() -> None:
    gates = two_gates()
    above = torch.cat([gate.logits.detach().flatten() for gate in gates.values()]) > 0
    assert 0.1 < float(above.float().mean()) < 0.4
    assert gates.curves(1) == {"density/logits_above_0": pytest.approx(float(above.float().mean()))}


def test_the_prior_has_the_sparsity_of_the_run() -> None:
    assert two_gates().prior_forms(0.7) == {"prior": Unstructured(0.7)}


def test_many_weights_of_two_types_have_each_their_own_noise() -> None:
    """More than one kernel takes at once, and not in the order of the types."""
    random = torch.Generator().manual_seed(0)
    state = state_at(100.0, 1.0, seed=2, step=7)
    gates = [gate_of((3, 5), name=str(i), state=state) for i in range(70)]
    weights = [torch.randn(3, 5, generator=random).to((torch.float32, torch.bfloat16)[i % 2]) for i in range(70)]
    for gate in gates:
        gate.logits.data.normal_(0, 0.05, generator=random)
    together = BernoulliGate.soften_all(gates, weights)
    upstream = [[torch.randn(each.shape, generator=random).to(each.dtype) for each in found] for found in together]
    torch.autograd.backward([each for found in together for each in found], [u for of in upstream for u in of])
    for gate, weight, found, given in zip(gates, weights, together, upstream, strict=True):
        alone = gate.soften(weight, *gate.keys())
        for one, other in zip(found, alone, strict=True):
            torch.testing.assert_close(one, other)
        assert gate.logits.grad is not None
        (expected,) = torch.autograd.grad(alone, gate.logits, given)
        torch.testing.assert_close(gate.logits.grad, expected)


def test_a_kind_whose_softening_is_a_mixins_is_softened_by_it() -> None:
    class Calm:
        def soften(self, weight: Tensor, key_0: int, key_1: int) -> Any:
            return None

    class CalmGate(Calm, BernoulliGate):  # type: ignore[misc]
        pass

    class Plain(BernoulliGate):
        pass

    assert CalmGate.soften_all.__func__ is Gate.soften_all.__func__  # type: ignore[attr-defined]
    assert Plain.soften_all.__func__ is BernoulliGate.soften_all.__func__  # type: ignore[attr-defined]
