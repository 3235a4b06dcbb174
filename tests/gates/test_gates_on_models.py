"""Gates on models of every family: what is learned, what is left as it was, and experts that share a mask."""

import copy
from typing import Any

import pytest
import torch
from bare_gates import IDS, gated, gradients, loss_of
from tiny import FAMILIES, tiny_model
from torch import Tensor
from torch.nn.utils import parametrize

from leap_pl.base_model.weights import find_weights
from leap_pl.gates import BernoulliGate, GateState, attach, detach
from leap_pl.masks import MaskSet, Provenance

pytestmark = pytest.mark.usefixtures("eager")


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
