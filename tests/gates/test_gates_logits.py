"""Logits of gates: always float32, where they start, and the hard masks that are cut from them."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from bare_gates import IDS, gate_of, gated, gradients, loss_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny import tiny_folder, tiny_model
from torch import Tensor
from torch.utils.data import DataLoader

from leap_pl.base_model.weights import find_weights
from leap_pl.errors import UserError
from leap_pl.gates import BernoulliGate, Gates, GateState, NMGate, Stored, TileGate, restore
from leap_pl.gates import bernoulli as kernels
from leap_pl.kernels.noise import columns, noise_keys
from leap_pl.losses.objective import Objective
from leap_pl.masks.patterns import NM
from leap_pl.oneshot.wanda import wanda_mask
from leap_pl.prior import Prior
from leap_pl.training.module import LeapModule

pytestmark = pytest.mark.usefixtures("eager")


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
    Gates.of(gates).choose(sparsity)
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
    Gates.of(gates).choose(0.375)
    assert gates["high"].hard_mask().flatten().tolist() == [True] * 4
    assert gates["low"].hard_mask().flatten().tolist() == [False, True, False, False]


def test_restored_gates_choose_as_the_gates_did() -> None:
    _, weights, gates, _ = gated("mixtral")
    gates.choose(0.4)
    stored = {
        name: Stored(gate.logits.detach().clone(), tuple(gate.shape), weights[name].input_dim)
        for name, gate in gates.items()
    }
    restored = restore("BernoulliGate", gate_of((1, 1), spread=0.02).settings(), stored)
    assert list(restored) == list(gates)
    restored.choose(0.4)
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
    gates = Gates.of({name: kind(weight, GateState(), **settings) for name, weight in weights.items()})
    for seed, gate in enumerate(gates.values()):
        inner = wanda_mask(torch.rand(gate.shape), torch.ones(gate.shape[-1]), NM(2, 4))
        gate.start_from(None, seed, **({"inner": inner} if kind is TileGate else {}))

    def stored(name: str, gate: Any) -> Stored:
        shapes = {part: torch.empty_like(tensor, device="meta") for part, tensor in gate.stored().items()}
        logits, read = shapes.pop("logits"), lambda part: gate.stored()[part].clone()
        return Stored(logits, tuple(gate.shape), weights[name].input_dim, shapes, read)

    found = {name: stored(name, gate) for name, gate in gates.items()}
    restored = restore(kind.__name__, gates.describe()["init_args"], found)
    for side in (gates, restored):
        side.choose(0.4)
    for name, gate in gates.items():
        assert all(tensor.is_meta for tensor in restored[name].stored().values())
        assert torch.equal(restored[name].hard_mask(), gate.hard_mask())


def test_restoring_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"'Nonsense' is unknown \(known: .*BernoulliGate.*give the mask\.safetensors"):
        restore("Nonsense", {}, {})
    with pytest.raises(UserError, match=r"w: stored logits of shape \(2, 3\); expected shape \(3, 2\)"):
        restore("BernoulliGate", {}, {"w": Stored(torch.zeros(2, 3), (3, 2), 1)})


def test_sampled_hard_masks_agree_with_the_exact_ones() -> None:
    gates = Gates.of({name: gate_of((200, 301), name=name) for name in ("a", "b")})
    for name, gate in gates.items():
        gate.start_from(torch.rand(gate.shape) < {"a": 0.9, "b": 0.2}[name], seed=0)
    gates.choose(0.5)
    exact = {name: gate.hard_mask().flatten() for name, gate in gates.items()}
    for stride, tolerance in ((1, 0.0), (7, 0.02), (64, 0.05)):
        sample = gates.sample_hard_masks(0.5, stride)
        for name in gates:
            assert sample[name].shape == exact[name][::stride].shape
            assert (sample[name] != exact[name][::stride]).float().mean() <= tolerance
    # Sampling leaves the chosen masks alone, and the general way gives the exact ones.
    assert all(torch.equal(gate.hard_mask().flatten(), exact[name]) for name, gate in gates.items())
    general = Gates.sample_hard_masks(gates, 0.5, 7)
    assert all(torch.equal(general[name], exact[name][::7]) for name in gates)


def test_the_kernels_know_no_state() -> None:
    """The mask is a function of logits, keys, α and τ, so a part of a weight's mask is made from its part."""
    keys = [torch.tensor(key, dtype=torch.int32) for key in noise_keys(0, 0, 0, "w")]
    logits = torch.randn(40, 25, generator=torch.Generator().manual_seed(0))
    place = (columns(25, logits.device), *keys, torch.tensor(6.25), torch.tensor(0.25))
    whole = kernels.soft_mask(logits, *place)
    again = kernels.soft_mask(logits[:13], *place)
    torch.testing.assert_close(whole[:13], again, rtol=1e-6, atol=0)
