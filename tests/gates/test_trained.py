"""Weights that are trained under gates: their gradients, their zeros, and a mask that stays as it is."""

import gc
import math
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import ref

import pytest
import torch
from bare_gates import IDS, noise_of, state_at
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_model
from torch import Tensor, nn

from leap_pl.base_model.backbone import checkpoint_activations
from leap_pl.base_model.weights import Weight, find_weights
from leap_pl.errors import UserError
from leap_pl.gates import BernoulliGate, FixedGate, Gate, Gates, GateState, NMGate, TileGate, attach, restore
from leap_pl.gates.attach import Stored, attach_trained
from leap_pl.gates.trained import _Again
from leap_pl.masks.bits import pack
from leap_pl.training.weights import LowRank, Master, WeightTraining, norms_in

pytestmark = pytest.mark.usefixtures("eager")

SETTINGS = WeightTraining(r=3, lora_alpha=6.0)


def bare(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, dim: int = -1) -> Weight:
    module = nn.Module()
    random = torch.Generator().manual_seed(1)
    module.weight = nn.Parameter(torch.randn(shape, generator=random).to(dtype), requires_grad=False)
    return Weight("w", module, "weight", None, "w", dim % len(shape))


def trained(kind: type[Gate], weight: Weight, **settings: Any) -> Gate:
    """A gate of some mask on a weight that has a master."""
    gate = kind(weight, state_at(100.0, 1.0, seed=2, step=7, micro_batch=1), **settings)
    mask = torch.rand(gate.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    gate.start_from(mask, seed=0)
    gate.trained = Master(weight, SETTINGS, 0)
    return gate


def master_of(gate: Gate) -> nn.Parameter:
    assert isinstance(gate.trained, Master)
    return gate.trained.master


@pytest.mark.parametrize("kind", [BernoulliGate, NMGate, TileGate])
def test_annealing_between_forward_and_backward_changes_nothing(kind: type[Gate]) -> None:
    """And neither does the state of the noise, as where losses of several micro-batches are summed."""
    found: list[list[Tensor]] = []
    for disturb in (False, True):
        weight = bare((8, 8))
        gate = trained(kind, weight, **({"tile": 4} if kind is TileGate else {}))
        masked = gate(weight.parameter)
        if disturb:
            gate.state.anneal(350.0, 0.05, **dict.fromkeys(gate.scales, 7.0))
            gate.state.step, gate.state.micro_batch, gate.state.seed = 5, 1, 9
        masked.square().sum().backward()
        assert gate.logits.grad is not None
        assert master_of(gate).grad is not None
        found.append([gate.logits.grad, master_of(gate).grad])  # type: ignore[list-item]
        assert float(gate.state.tau) == pytest.approx(0.05 if disturb else 1.0)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_low_rank_weight_is_the_same_under_autocast() -> None:
    """As with --trainer.precision bf16-mixed; the export computes it without."""
    weight = bare((6, 16))
    low = LowRank(weight, SETTINGS, 0)
    parts = {name: torch.randn_like(part) for name, part in low.named_parameters()}
    expected = LowRank.value(weight.parameter, parts, SETTINGS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LowRank.value(weight.parameter, parts, SETTINGS), expected)


class Chosen(nn.Module):
    """A block of which each call uses one of two weights of one shape, as of experts that are modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 5, bias=False) for _ in range(2))

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        found: Tensor = self.experts[chosen](x)
        return found


@pytest.mark.parametrize("chosen", [0, 1])
def test_the_weight_of_an_expert_that_is_not_used_has_no_gradient(chosen: int) -> None:
    """Masked weights of a block are computed together, used or not."""
    block = Chosen()
    weights = {f"{n}": Weight(f"{n}", linear, "weight", 0, f"{n}", 1, block) for n, linear in enumerate(block.experts)}
    gates = attach(weights, BernoulliGate, state_at(100.0, 1.0))
    for name, gate in gates.items():
        gate.start_from(None, 0)
        gate.trained = Master(weights[name], SETTINGS, 0)
    x, upstream = torch.randn(3, 6), torch.randn(3, 5)
    (block(x, chosen) * upstream).sum().backward()
    idle, used = gates[f"{1 - chosen}"], gates[f"{chosen}"]
    for gate in gates.values():  # the logits too
        assert (gate.logits.grad is not None and bool(gate.logits.grad.any())) == (gate is used)
    left = master_of(idle).grad
    assert left is None or not left.any()
    with torch.no_grad():
        mask = used.soften(torch.ones(5, 6), *used.keys())[0]
    found = master_of(used).grad
    assert found is not None
    assert torch.allclose(found, mask * (upstream.T @ x), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_master_against_float64(dtype: torch.dtype) -> None:
    """dW = M ⊙ dW̃ and, with dθ, what autograd finds in the formula written out; the sums move no weight."""
    weight = bare((3, 17, 5), dtype)
    gate = trained(BernoulliGate, weight)
    upstream = torch.randn(gate.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    masked = gate(weight.parameter)
    assert gate.kept is not None
    ((masked * upstream).sum().float() + 0.3 * gate.kept + 0.2 * gate.energy).backward()

    theta = gate.logits.detach().double().requires_grad_()
    value = weight.parameter.double().requires_grad_()
    mask = torch.sigmoid(100.0 * theta + noise_of(gate))
    constant = value.detach()
    whole = (mask * value * upstream.double()).sum() + 0.3 * mask.sum() + 0.2 * (mask * constant).square().sum()
    whole.backward()
    assert value.grad is not None
    assert theta.grad is not None
    rounding = {torch.float32: 2e-5, torch.bfloat16: 2**-8}[dtype]
    grad = master_of(gate).grad
    assert grad is not None
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad.double(), value.grad, rtol=rounding, atol=1e-6)
    assert gate.logits.grad is not None
    assert (gate.logits.grad.double() - theta.grad).abs().max() <= 2e-5 * theta.grad.abs().max()
    assert weight.parameter.grad is None


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (BernoulliGate, {}),
        (NMGate, {}),
        (TileGate, {"tile": 8}),
        (TileGate, {"tile": 8, "mode": "tile"}),
        (FixedGate, {}),
    ],
)
def test_every_kind_of_gate_passes_the_gradient_times_its_mask(kind: type[Gate], settings: dict[str, Any]) -> None:
    """The mask by the gate's own forward pass of ones, with the noise of the same step."""
    weight = bare((6, 16))
    gate = trained(kind, weight, **settings)
    upstream = torch.randn(gate.shape)
    (gate(weight.parameter) * upstream).sum().backward()
    mask = gate.soften(torch.ones(gate.shape), *gate.keys())[0].detach()
    torch.testing.assert_close(master_of(gate).grad, mask * upstream)
    assert 0.01 < float(mask.mean()) < 0.9


@given(st.lists(st.integers(1, 9), min_size=2, max_size=3), st.integers(0, 2**31))
def test_a_fixed_mask_keeps_its_zeros_and_no_others(shape: list[int], seed: int) -> None:
    """Whatever the bits: zeros exactly where it removes, soft and hard, in the gradient too; a kept 0 may move."""
    random = torch.Generator().manual_seed(seed)
    weight = bare(tuple(shape))
    mask = torch.rand(shape, generator=random) < 0.5
    gate = FixedGate(weight, GateState())
    gate.start_from(mask, seed=0)
    gate.trained = Master(weight, SETTINGS, 0)
    with torch.no_grad():
        master_of(gate).view(-1)[0] = 0.0
    assert torch.equal(gate.hard_mask(), mask)
    assert torch.equal(gate.bits, pack(mask))
    expected = torch.where(mask, master_of(gate).detach(), 0.0)
    for stride in (1, 2, 7):
        assert torch.equal(gate.sample_hard_mask(stride), mask.view(-1)[::stride])
    soft = gate(weight.parameter)
    assert torch.equal(soft.detach(), expected)
    assert int(gate.kept or 0) == int(mask.sum())
    torch.testing.assert_close(gate.energy, expected.square().sum())
    soft.sum().backward()
    assert torch.equal(master_of(gate).grad, mask.float())
    for mode, found in (("hard", expected), ("dense", weight.parameter)):
        with gate.state.passing(mode):  # type: ignore[arg-type]
            assert torch.equal(gate(weight.parameter), found)


def test_a_fixed_gate_learns_nothing_and_says_what_it_lacks() -> None:
    weight = bare((4, 8))
    gates = Gates.of({"w": FixedGate(weight, GateState(), "2:4")})
    assert gates.learned() == {}
    assert gates.form == "2:4"
    assert str(gates.prior_forms(0.3)["prior"]) == "2:4"
    with pytest.raises(UserError, match=r"a FixedGate needs a mask.*--model\.mask"):
        gates.check_priors({})
    with pytest.raises(UserError, match="the fixed mask is not known"):
        gates.choose(0.5)
    mask = torch.rand(4, 8) < 0.5
    stored = Stored(None, (4, 8), 1, {"bits": pack(mask)})
    assert torch.equal(restore("FixedGate", {}, {"w": stored})["w"].hard_mask(), mask)


def test_low_rank_updates_are_of_each_orientation_and_start_at_the_weight() -> None:
    for shape, dim in (((6, 16), 1), ((16, 6), 0), ((3, 5, 8), 2), ((3, 8, 5), 1)):
        weight = bare(shape, torch.bfloat16, dim)
        update = LowRank(weight, SETTINGS, 0)
        assert torch.equal(update(weight.parameter), weight.parameter)
        # As peft's: the factor that the inputs pass through is random, and that which makes the outputs is zero.
        into, out = (update.lora_A, update.lora_B) if dim == len(shape) - 1 else (update.lora_B, update.lora_A)
        assert into.all()
        assert not out.any()
        with torch.no_grad():
            out.normal_()
        product = 2.0 * torch.einsum("...or,...ri->...oi", update.lora_B.double(), update.lora_A.double())
        expected = (weight.parameter.double() + product).float()
        torch.testing.assert_close(update(weight.parameter).float(), expected, rtol=2**-8, atol=1e-6)
        again = LowRank(weight, SETTINGS, 0)
        part = "lora_A" if into is update.lora_A else "lora_B"
        assert torch.equal(getattr(again, part), into)
        assert not torch.equal(getattr(LowRank(weight, SETTINGS, 1), part), into)


def gated(model: nn.Module, kind: type[Gate], update: type[Master] | type[LowRank]) -> tuple[Gates[Any], GateState]:
    """A model whose gated weights and norms are trained, away from where they started."""
    model.requires_grad_(False)
    weights, state = find_weights(model), state_at(100.0, 1.0, seed=3)
    gates = attach(weights, kind, state)
    random = torch.Generator().manual_seed(5)
    for name, gate in gates.items():
        gate.start_from(torch.rand(gate.shape, generator=random) < 0.6, seed=0)
        gate.trained = update(weights[name], SETTINGS, 0)
    for norm in list(norms_in(model)):
        attach_trained(norm, Master(norm, SETTINGS, 0), state)
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter += 0.02 * torch.randn(parameter.shape, generator=random)
    return gates, state


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_unmerged_and_the_teacher_is_the_base_model(family: str) -> None:
    """Low-rank updates and norms written into the weights of a plain model, with every zero of the mask."""
    plain, model = tiny_model(family), tiny_model(family)
    base = logits_of(plain)
    gates, state = gated(model, FixedGate, LowRank)
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, gate in gates.items():
            merged = gate.current(parameters[name])
            parameters[name].copy_(torch.where(gate.hard_mask(), merged, 0.0))
        for norm in list(norms_in(plain)):
            chain: Any = model.get_submodule(norm.name.rpartition(".")[0])
            norm.parameter.copy_(getattr(chain, norm.tensor))
    with state.passing("hard"):
        torch.testing.assert_close(logits_of(model), logits_of(plain), rtol=1e-5, atol=1e-5)
    with state.passing("dense"):
        assert torch.equal(logits_of(model), base)
    assert not torch.allclose(logits_of(plain), base, atol=1e-3)
    removed = sum(int((parameters[name][~gate.hard_mask()] != 0).sum()) for name, gate in gates.items())
    assert removed == 0


@pytest.mark.parametrize("update", [Master, LowRank])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", [BernoulliGate, NMGate, partial(TileGate, tile=4), partial(TileGate, tile=4, mode="tile")]
)
def test_a_trained_weight_is_computed_again_and_not_kept(
    kind: Any, dtype: torch.dtype, update: type[Master] | type[LowRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the backward pass of its gate: nothing of its size is in memory between the passes, and no bit differs."""
    made: list[ref[Tensor]] = []
    value = update.value

    def seen(base: Tensor, *others: Any) -> Tensor:
        result = value(base, *others)
        if torch.is_grad_enabled() and base.dim() > 1 and not isinstance(result, nn.Parameter):
            made.append(ref(result.untyped_storage()))
        return result

    monkeypatch.setattr(update, "value", staticmethod(seen))
    found = []
    for again in (True, False):
        if not again:
            monkeypatch.setattr(_Again, "pack", lambda _, tensor: tensor.detach())
        made.clear()
        model = tiny_model().to(dtype).train()
        gated(model, kind, update)
        loss: Any = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        if dtype == torch.bfloat16 or update is LowRank:  # a master in float32 of a weight in float32 is the weight
            assert made
            assert any(storage() is not None for storage in made) != again
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_a_model_with_trained_weights_is_freed() -> None:
    """Also between forward and backward pass, when its graph refers to what is computed again."""
    model = tiny_model().train()
    gates, _ = gated(model, BernoulliGate, Master)
    model(input_ids=IDS, labels=IDS, use_cache=False)
    there = ref(model), ref(master_of(next(iter(gates.values()))))
    del model, gates
    gc.collect()
    assert [which() for which in there] == [None, None]


@pytest.mark.parametrize(
    ("kind", "update"),
    [
        (BernoulliGate, Master),
        (FixedGate, Master),
        (BernoulliGate, LowRank),
        (NMGate, LowRank),
        (partial(TileGate, tile=4), Master),
    ],
)
def test_gradients_are_the_same_under_activation_checkpointing(kind: Any, update: Any) -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny_model().bfloat16().train()
        gates, _ = gated(model, kind, update)
        if checkpointing:
            checkpoint_activations(model)
        loss: Any = model(input_ids=IDS, labels=IDS, use_cache=False)
        kept = {name: gate.kept for name, gate in gates.items()}
        loss.loss.backward()
        # The sums of a recomputation would keep its graph, and so its weights, in memory.
        assert all(gate.kept is kept[name] for name, gate in gates.items())
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(grad is not None and bool(grad.any()) for grad in grads.values())
        if update is Master and not isinstance(kind, partial):
            assert len(grads) == 5 + len(gates) * (2 if kind is BernoulliGate else 1)
        found.append(grads)
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


def test_masters_keep_their_dtype_when_the_model_is_cast() -> None:
    model = tiny_model()
    gates, _ = gated(model, FixedGate, Master)
    model.to(torch.bfloat16)
    name, gate = next(iter(gates.items()))
    assert master_of(gate).dtype == torch.float32
    assert gate.current(find_weights(model)[name].parameter).dtype == torch.bfloat16
    assert gate.bits.dtype == torch.uint8


@pytest.mark.parametrize(("shape", "dim"), [((8, 4096), 1), ((4096, 8), 0)])
def test_low_rank_updates_start_by_name_and_by_the_inputs(shape: tuple[int, int], dim: int) -> None:
    first = bare(shape, dim=dim)
    updates = [LowRank(weight, WeightTraining(r=64), 0) for weight in (first, replace(first, name="v"))]
    one, other = (update.lora_A if dim else update.lora_B for update in updates)
    assert one.numel() == 64 * 4096
    assert not torch.equal(one, other)
    assert float(one.detach().std()) == pytest.approx(1 / math.sqrt(3 * 4096), rel=0.15)
