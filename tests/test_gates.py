"""Gates: the formula and its gradients, on and off a model, hard masks, and logits that stay float32."""

import copy
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny import FAMILIES, VOCABULARY, tiny_folder, tiny_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from leap_pl.errors import UserError
from leap_pl.gates import BernoulliGate, Gate, GateState, NMGate, Stored, TileGate, attach, detach, restore
from leap_pl.gates import bernoulli as kernels
from leap_pl.gates import compiled as compiling
from leap_pl.gates.noise import columns, element_bits, logistic, noise_keys
from leap_pl.masks import MaskSet, Provenance
from leap_pl.module import LeapModule
from leap_pl.objective import Objective
from leap_pl.oneshot.wanda import wanda_mask
from leap_pl.patterns import NM
from leap_pl.prior import Prior
from leap_pl.weights import Weight, find_weights

IDS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
ANNEALED = [(25.0, 4.0), (0.0, 1.0), (100.0, 1.0), (350.0, 0.05)]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiling takes its time; one test below does."""
    monkeypatch.setenv("LEAP_PL_COMPILE", "0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gate_of(shape: tuple[int, ...], *, name: str = "w", state: GateState | None = None, **kw: float) -> BernoulliGate:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(shape), requires_grad=False)
    return BernoulliGate(Weight(name, module, "weight", None, name, len(shape) - 1), state or GateState(), **kw)


def state_at(alpha: float, tau: float, **kw: Any) -> GateState:
    state = GateState(**kw)
    state.anneal(alpha, tau)
    return state


def noise_of(gate: Gate) -> Tensor:
    """The gate's noise at this step, its float32 values as float64."""
    *rows, length = gate.logits.shape
    bits = element_bits(math.prod(rows), columns(length, torch.device("cpu")), *gate.keys())
    return logistic(bits).double().view(gate.logits.shape)


def gated(family: str = "llama", **changes: Any) -> tuple[nn.Module, dict[str, Weight], dict[str, Gate], GateState]:
    """A tiny model with gates on, started from the larger half of each weight's magnitudes."""
    model = tiny_model(family, **changes).requires_grad_(False)
    weights, state = find_weights(model), state_at(100.0, 1.0, seed=3)
    gates = attach(weights, BernoulliGate, state)
    for name, gate in gates.items():
        magnitude = weights[name].parameter.abs()
        gate.start_from(magnitude > magnitude.median(), seed=0)
    return model, weights, gates, state


def loss_of(model: Any, gates: dict[str, Gate]) -> Tensor:
    """A loss in which the masked weights and both sums of every gate take part."""
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    for i, gate in enumerate(gates.values()):
        assert gate.kept is not None
        loss = loss + (0.01 + i * 1e-3) * gate.kept / gate.logits.numel() - 0.05 * (gate.energy + 1e-6).sqrt()
    return loss


def gradients(model: Any, gates: dict[str, Gate]) -> dict[str, Tensor]:
    for gate in gates.values():
        gate.clear()
        gate.logits.grad = None
    loss_of(model, gates).backward()
    found = {name: gate.logits.grad for name, gate in gates.items()}
    assert all(grad is not None and grad.dtype == torch.float32 for grad in found.values())
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


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


def test_without_a_compiler_the_gates_say_so_once_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("\nno C++ compiler\nand more")

    monkeypatch.delenv("LEAP_PL_COMPILE")
    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(compiling, "_verdicts", {})
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
    BernoulliGate.choose(gates, 0.5)
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
        soften = BernoulliGate.soften
        with pytest.MonkeyPatch.context() as patch:

            def watched(self: BernoulliGate, *args: Tensor, soften: Any = soften, passes: Any = passes) -> Any:
                result = soften(self, *args)
                passes[self.name].append(result[0].detach().clone())
                return result

            patch.setattr(BernoulliGate, "soften", watched)
            found.append((gradients(model, gates), passes))
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
    soften = BernoulliGate.soften
    monkeypatch.setattr(BernoulliGate, "soften", lambda self, *a: (made.append(self.name), soften(self, *a))[1])
    for _ in range(2):
        made.clear()
        gradients(model, gates)
        assert sorted(made) == sorted(weights)
    assert all(gate._made == [] for gate in gates.values())


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
    assert all(gate._made == [] and not gate._in_call for gate in gates.values())


# -- float32 logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "float"])
def test_logits_keep_every_bit_when_the_model_is_cast(cast: str) -> None:
    model, weights, gates, _ = gated()
    before = gradients(model, gates)
    logits = {name: gate.logits.detach().clone() for name, gate in gates.items()}
    parameters = [gate.logits for gate in gates.values()]
    for to in (lambda m: getattr(m, cast)(), lambda m: m.to(getattr(torch, cast)), lambda m: m.to(m.device)):
        to(model)
        for name, gate in gates.items():
            assert gate.logits.dtype == torch.float32
            assert torch.equal(gate.logits, logits[name])
            assert gate.logits.grad is not None
            assert torch.equal(gate.logits.grad, before[name])
    assert all(gate.logits is parameter for gate, parameter in zip(gates.values(), parameters, strict=True))
    dtype = getattr(torch, cast)
    assert all(weight.parameter.dtype == dtype for weight in weights.values())
    assert model(IDS).logits.dtype == dtype
    loss_of(model, gates).backward()
    assert all(gate.logits.grad is not None and gate.logits.grad.dtype == torch.float32 for gate in gates.values())


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
def test_logits_are_float32_under_every_precision_plugin(tmp_path: Path, precision: Any) -> None:
    """A run of updates that are far too small for bfloat16."""
    module = LeapModule(
        str(tiny_folder(tmp_path / "m", num_hidden_layers=1)),
        objective=Objective(distillation=0.5),
        prior=Prior(method="none"),
        dtype="bfloat16" if precision == "bf16-true" else "float32",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-5),
        warmup_steps=0,
    )
    starts: dict[str, Tensor] = {}

    class Watch(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            starts.update({name: gate.logits.detach().clone() for name, gate in module.gates.items()})

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
            for gate in module.gates.values():
                assert gate.logits.grad is not None
                assert gate.logits.dtype == gate.logits.grad.dtype == torch.float32
                gate.logits.grad.copy_(torch.full_like(gate.logits, 1.0))

    trainer = L.Trainer(
        accelerator="cpu", precision=precision, max_steps=2, callbacks=[Watch()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, barebones=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([{"input_ids": IDS}] * 2, batch_size=None))  # type: ignore[arg-type]
    # Steps of 1e-5 and, half way down the cosine, 5e-6.
    for name, gate in module.gates.items():
        torch.testing.assert_close(gate.logits.detach(), starts[name] - 1.5e-5, rtol=0, atol=1e-8)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert all(weight.parameter.dtype == dtype for weight in module.weights.values())


# -- the start --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spread", "strength"), [(0.014, 3.0), (0.5, 1.0), (0.014, 0.0)])
def test_the_start_leans_towards_the_prior(spread: float, strength: float) -> None:
    """θ = N(0, spread²) ± strength·spread."""
    gate = gate_of((300, 400), spread=spread, strength=strength)
    prior = torch.rand(300, 400, generator=torch.Generator().manual_seed(0)) < 0.3
    gate.start_from(prior, seed=0)
    logits = gate.logits.detach().double().numpy()
    assert gate.logits.requires_grad
    for kept, lean in ((prior.numpy(), strength), (~prior.numpy(), -strength)):
        assert stats.kstest(logits[kept] / spread, stats.norm(lean).cdf).pvalue > 1e-3
    if strength == 3:
        assert abs((logits[prior.numpy()] > 0).mean() - stats.norm.cdf(3)) < 1e-3


def test_the_start_without_a_prior_is_normal() -> None:
    gate = gate_of((300, 400))
    gate.start_from(None, seed=0)
    assert stats.kstest(gate.logits.detach().flatten().double() / 0.014, stats.norm.cdf).pvalue > 1e-3


def test_the_start_depends_on_seed_and_name_alone() -> None:
    """Not on the order, the global generator or what the logits were; and it leaves that generator alone."""

    def starts(order: str, seed: int) -> dict[str, Tensor]:
        gates = {name: gate_of((5, 7), name=name) for name in order}
        for gate in gates.values():
            gate.start_from(None, seed)
        return {name: gate.logits.detach() for name, gate in gates.items()}

    before = torch.get_rng_state()
    one = starts("abc", 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    other = starts("cab", 0)
    assert all(torch.equal(one[name], other[name]) for name in "abc")
    assert not torch.equal(one["a"], one["b"])
    assert not torch.equal(one["a"], starts("a", 1)["a"])
    gate = gate_of((5, 7), name="a")
    gate.start_from(torch.ones(5, 7, dtype=torch.bool), 1)
    gate.start_from(None, 0)
    assert torch.equal(gate.logits, one["a"])


# -- hard masks -------------------------------------------------------------------------------------------

few_values = st.lists(st.sampled_from([-0.3, -0.1, -0.0, 0.0, 0.1, 0.2]), min_size=1, max_size=30)


def with_logits(values: dict[str, list[float]]) -> dict[str, BernoulliGate]:
    gates = {name: gate_of((len(v), 1), name=name) for name, v in values.items()}
    for name, gate in gates.items():
        gate.logits.data.copy_(torch.tensor(values[name])[:, None])
    return gates


@settings(max_examples=150, deadline=None)
@given(st.lists(few_values, min_size=1, max_size=4), st.sampled_from([0.5, 0.25]) | st.floats(0, 1))
def test_hard_masks_have_exactly_the_asked_sparsity(values: list[list[float]], sparsity: float) -> None:
    """Ties included; they are broken by weight and index, and no removed logit is above a kept one."""
    gates = with_logits({str(i): v for i, v in enumerate(values)})
    BernoulliGate.choose(gates, sparsity)
    kept = torch.cat([gate.hard_mask().flatten() for gate in gates.values()])
    logits = torch.cat([gate.logits.detach().flatten() for gate in gates.values()])
    assert int((~kept).sum()) == round(sparsity * kept.numel())
    if kept.any() and not kept.all():
        edge = logits[kept].min()
        assert logits[~kept].max() <= edge
        tied = kept[logits == edge].int()
        assert (tied.diff() <= 0).all()
    for gate in gates.values():
        with gate.state.passing("hard"):
            assert torch.equal(gate(torch.full(gate.shape, -2.0)), torch.where(gate.hard_mask(), -2.0, 0.0))


def test_a_hard_mask_is_chosen_over_all_weights_together() -> None:
    gates = with_logits({"high": [0.3, 0.2, 0.2, 0.1], "low": [-0.1, 0.0, -0.2, -0.3]})
    BernoulliGate.choose(gates, 0.375)
    assert gates["high"].hard_mask().flatten().tolist() == [True] * 4
    assert gates["low"].hard_mask().flatten().tolist() == [False, True, False, False]


def test_restored_gates_choose_as_the_gates_did() -> None:
    _, weights, gates, _ = gated("mixtral")
    BernoulliGate.choose(gates, 0.4)
    stored = {
        name: Stored(gate.logits.detach().clone(), tuple(gate.shape), weights[name].input_dim)
        for name, gate in gates.items()
    }
    restored = restore("BernoulliGate", gate_of((1, 1), spread=0.02).settings(), stored)
    assert list(restored) == list(gates)
    BernoulliGate.choose(restored, 0.4)
    for name, gate in gates.items():
        assert type(restored[name]) is BernoulliGate
        assert restored[name].input_dim == gate.input_dim
        assert torch.equal(restored[name].hard_mask(), gate.hard_mask())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (BernoulliGate, {}),
        (NMGate, {"n": 2, "m": 4}),
        (TileGate, {"n": 2, "m": 4, "tile": 8, "mode": "joint"}),
        (TileGate, {"n": 2, "m": 4, "tile": 8, "mode": "tile"}),
    ],
)
def test_gates_restored_without_reading_choose_as_the_gates_did(kind: Any, settings: dict[str, Any]) -> None:
    weights = find_weights(tiny_model())
    gates = {name: kind(weight, GateState(), **settings) for name, weight in weights.items()}
    for seed, gate in enumerate(gates.values()):
        inner = wanda_mask(torch.rand(gate.shape), torch.ones(gate.shape[-1]), NM(2, 4))
        gate.start_from(None, seed, **({"inner": inner} if kind is TileGate else {}))

    def stored(name: str, gate: Any) -> Stored:
        shapes = {part: torch.empty_like(tensor, device="meta") for part, tensor in gate.stored().items()}
        logits, read = shapes.pop("logits"), lambda part: gate.stored()[part].clone()
        return Stored(logits, tuple(gate.shape), weights[name].input_dim, shapes, read)

    found = {name: stored(name, gate) for name, gate in gates.items()}
    restored = restore(kind.__name__, next(iter(gates.values())).settings(), found)
    for side in (gates, restored):
        kind.choose(side, 0.4)
    for name, gate in gates.items():
        assert all(tensor.is_meta for tensor in restored[name].stored().values())
        assert torch.equal(restored[name].hard_mask(), gate.hard_mask())


def test_restoring_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"kind 'Nonsense' are not known here \(known: .*BernoulliGate"):
        restore("Nonsense", {}, {})
    with pytest.raises(UserError, match=r"w: its logits are \(2, 3\), and should be \(3, 2\)"):
        restore("BernoulliGate", {}, {"w": Stored(torch.zeros(2, 3), (3, 2), 1)})


def test_sampled_hard_masks_agree_with_the_exact_ones() -> None:
    gates = {name: gate_of((200, 301), name=name) for name in ("a", "b")}
    for name, gate in gates.items():
        gate.start_from(torch.rand(gate.shape) < {"a": 0.9, "b": 0.2}[name], seed=0)
    BernoulliGate.choose(gates, 0.5)
    exact = {name: gate.hard_mask().flatten() for name, gate in gates.items()}
    for stride, tolerance in ((1, 0.0), (7, 0.02), (64, 0.05)):
        sample = BernoulliGate.sample_hard_masks(gates, 0.5, stride)
        for name in gates:
            assert sample[name].shape == exact[name][::stride].shape
            assert (sample[name] != exact[name][::stride]).float().mean() <= tolerance
    # Sampling leaves the chosen masks alone, and the general way gives the exact ones.
    assert all(torch.equal(gate.hard_mask().flatten(), exact[name]) for name, gate in gates.items())
    general = Gate.sample_hard_masks.__func__(BernoulliGate, gates, 0.5, 7)  # type: ignore[attr-defined]
    assert all(torch.equal(general[name], exact[name][::7]) for name in gates)


def test_the_kernels_know_no_state() -> None:
    """The mask is a function of logits, keys, α and τ, so a part of a weight's mask is made from its part."""
    keys = [torch.tensor(key, dtype=torch.int32) for key in noise_keys(0, 0, 0, "w")]
    logits = torch.randn(40, 25, generator=torch.Generator().manual_seed(0))
    place = (columns(25, logits.device), *keys, torch.tensor(6.25), torch.tensor(0.25))
    whole = kernels.soft_mask(logits, *place)
    again = kernels.soft_mask(logits[:13], *place)
    torch.testing.assert_close(whole[:13], again, rtol=1e-6, atol=0)
