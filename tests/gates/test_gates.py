"""Gates: the formula and its gradients, on and off a model, hard masks, and logits that stay float32."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bare_gates import IDS, gate_of, gated, gradients, loss_of, noise_of, state_at
from tiny import FAMILIES, tiny_model
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.nn.utils import parametrize
from torch.torch_version import TorchVersion

from leap_pl.base_model.weights import find_weights
from leap_pl.gates import BernoulliGate, GateState, attach, detach
from leap_pl.kernels import compiled as compiling
from leap_pl.masks import MaskSet, Provenance

ANNEALED = [(25.0, 4.0), (0.0, 1.0), (100.0, 1.0), (350.0, 0.05)]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiling takes its time; one test below does."""
    monkeypatch.setenv("LEAP_PL_COMPILE", "0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        with pytest.raises(ValueError, match="must be above 0"):
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


# -- on a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_on_and_off_leaves_the_model_as_it_was(family: str) -> None:
    model = tiny_model(family)
    before = copy.deepcopy(model)
    weights = find_weights(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    modules = {name: type(m) for name, m in model.named_modules()}
    gates = attach(weights, BernoulliGate, GateState())
    assert list(gates) == list(weights)
    assert type(model) is type(before)
    assert set(modules) <= {name for name, _ in model.named_modules()}
    assert all(isinstance(gate, BernoulliGate) and gate.name == name for name, gate in gates.items())
    assert not any(weight.parameter.requires_grad for weight in weights.values())
    learnable = [
        p for p in model.parameters() if p.dtype == torch.float32 and any(p is g.logits for g in gates.values())
    ]
    assert len(learnable) == len(weights)
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, before(IDS).logits)
    detach(weights)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert {name: type(m) for name, m in model.named_modules()} == modules
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.state_dict().keys() == before.state_dict().keys()
    assert not any(parametrize.is_parametrized(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before(IDS).logits)
    detach(weights)  # a second time: nothing to do


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_is_the_plain_model_and_hard_is_the_applied_mask(family: str) -> None:
    plain = tiny_model(family)
    model, _, gates, state = gated(family)
    gates.choose(0.5)
    masks = {name: gate.hard_mask() for name, gate in gates.items()}
    pruned = MaskSet(masks, Provenance("tiny", "", "leap")).apply_(tiny_model(family), check=False)
    with torch.no_grad():
        with state.passing("dense"):
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
        with state.passing("hard"):
            assert torch.equal(model(IDS).logits, pruned(IDS).logits)
        assert state.mode == "soft"
        assert not torch.equal(model(IDS).logits, plain(IDS).logits)


def test_another_mode_ends_with_its_block_even_by_an_error() -> None:
    state = GateState()
    with pytest.raises(KeyError), state.passing("dense"):
        raise KeyError
    assert state.mode == "soft"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_logit_learns(family: str) -> None:
    """Each gate's gradient is there and finite; a step against it lowers the loss."""
    model, _, gates, _ = gated(family)
    before = loss_of(model(IDS) and model, gates)
    grads = gradients(model, gates)
    assert all(grad.isfinite().all() and grad.any() for grad in grads.values())
    norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum()
    step = 0.01 / norm.sqrt()
    with torch.no_grad():
        for name, gate in gates.items():
            gate.logits -= step * grads[name]
        after = loss_of(model, gates)
    predicted = step * norm
    assert 0.5 * predicted < before - after < 1.5 * predicted


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_activation_checkpointing_gives_the_same_mask_and_bit_equal_gradients(family: str) -> None:
    found = []
    for checkpointing in (False, True):
        model, _, gates, _ = gated(family)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        passes: dict[str, list[Tensor]] = {name: [] for name in gates}
        soften = BernoulliGate.soften_all
        with pytest.MonkeyPatch.context() as patch:

            def watched(gates: Any, weights: Any, soften: Any = soften, passes: Any = passes) -> Any:
                results = soften(gates, weights)
                for gate, result in zip(gates, results, strict=True):
                    passes[gate.name].append(result[0].detach().clone())
                return results

            patch.setattr(BernoulliGate, "soften_all", watched)
            found.append((gradients(model, gates), passes))
        # Else two bytes for each weight of a block would stay in memory to the next step.
        assert all(gate.call is None or gate.call._masked == gate.call._ready == {} for gate in gates.values())
    (plain, first), (recomputed, second) = found
    for name in plain:
        assert torch.equal(plain[name], recomputed[name]), name
        assert len(first[name]) == 1
        assert all(torch.equal(first[name][0], masked) for masked in second[name])
    assert all(len(masked) == 2 for masked in second.values())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_stacked_experts_have_their_mask_made_once_a_call(monkeypatch: pytest.MonkeyPatch, implementation: str) -> None:
    model, weights, gates, _ = gated("mixtral")
    model.set_experts_implementation(implementation)
    made: list[str] = []
    soften = BernoulliGate.soften_all
    monkeypatch.setattr(
        BernoulliGate, "soften_all", lambda gates, w: (made.extend(gate.name for gate in gates), soften(gates, w))[1]
    )
    for _ in range(2):
        made.clear()
        gradients(model, gates)
        assert sorted(made) == sorted(weights)
    assert all(gate.call._masked == gate.call._ready == {} for gate in gates.values())


def test_a_block_asks_one_parametrization_and_takes_the_other_weights_as_they_are_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, weights, gates, state = gated("llama")
    asked: list[parametrize.ParametrizationList] = []
    forward = parametrize.ParametrizationList.forward
    monkeypatch.setattr(
        parametrize.ParametrizationList, "forward", lambda chain: (asked.append(chain), forward(chain))[1]
    )
    for mode in ("soft", "hard", "dense"):
        asked.clear()
        with state.passing(mode):
            model(IDS)
        assert len(asked) == (len({weight.layer for weight in weights.values()}) if mode == "soft" else len(gates))
    asked.clear()
    for weight in weights.values():  # no block is running
        getattr(weight.module, weight.tensor)
    assert asked == [weight.chain for weight in weights.values()]


def test_a_further_parametrization_of_a_gated_weight_is_obeyed() -> None:
    class Twice(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model, weights, _, _ = gated("llama")
    weight = weights["model.layers.1.mlp.up_proj.weight"]
    seen: list[Tensor] = []
    weight.module.register_forward_hook(lambda _, given, out: seen.append(out))
    with torch.no_grad():
        model(IDS)
        parametrize.register_parametrization(weight.module, weight.tensor, Twice())
        model(IDS)
    assert torch.equal(seen[1], 2 * seen[0])


def test_stacked_experts_by_two_implementations() -> None:
    """One expert at a time, and all at once: the same loss and gradients, and a new mask at the next step."""
    found = []
    for implementation in ("eager", "grouped_mm"):
        model, _, gates, state = gated("mixtral")
        model.set_experts_implementation(implementation)
        first = gradients(model, gates)
        state.step = 1
        found.append((first, gradients(model, gates), loss_of(model, gates).detach()))
    for one, other in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    name = "model.layers.0.mlp.experts.down_proj"
    assert not torch.equal(found[0][0][name], found[0][1][name])


def test_an_error_in_the_middle_of_the_experts_leaves_no_mask_behind() -> None:
    model, _, gates, state = gated("mixtral")
    experts = model.get_submodule("model.layers.0.mlp.experts")
    with torch.no_grad():
        with pytest.raises(AttributeError):
            experts(None, None, None)
        expected = model(IDS).logits
        state.step = 1
        assert not torch.equal(model(IDS).logits, expected)
    assert all(gate.call._masked == gate.call._ready == {} and not gate.call.running for gate in gates.values())


def places(model: torch.nn.Module, gates: Any) -> dict[str, str]:
    """The path of each gate in the model."""
    paths = {id(module): path for path, module in model.named_modules()}
    return {name: paths[id(gate)] for name, gate in gates.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_deep_copy_uses_its_own_masks(checkpointing: bool) -> None:
    model, _, gates, _ = gated("llama")
    model.train()
    model(IDS)  # the sums of this pass and their graph stay behind
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    other = copy.deepcopy(model)
    theirs = {name: other.get_submodule(path) for name, path in places(model, gates).items()}
    with torch.no_grad():
        for gate in gates.values():
            gate.logits.neg_()
    loss = other(IDS).logits.float().square().mean()
    loss.backward()
    alone = {name: gate.logits.grad for name, gate in theirs.items()}
    assert all(grad is not None for grad in alone.values())
    with torch.no_grad():
        assert not torch.equal(other(IDS).logits, model(IDS).logits)
        for gate in gates.values():
            gate.logits.neg_()
        assert torch.equal(other(IDS).logits, model(IDS).logits)
