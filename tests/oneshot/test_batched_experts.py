"""Experts that one batched product computes, with zeros in the rows of tokens that other experts get (Llama 4)."""

import logging

import pytest
import torch
from matrices import all_matrices, tokens
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4TextConfig

from leap_pl.base_model.weights import find_weights
from leap_pl.oneshot.fisher import measure_moments
from leap_pl.oneshot.prune import prune
from leap_pl.oneshot.walk import Walk, WalkOptions
from leap_pl.prior.grading import measure_input_squares

EXPERTS = 8


def llama4() -> Llama4ForCausalLM:
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=24,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        attention_chunk_size=64,
    )
    return Llama4ForCausalLM(config).eval()


def routed(model: Llama4ForCausalLM, blocks_NT: Tensor) -> list[dict[int, Tensor]]:
    """Of each layer: expert → the rows that it gets, as its module computes them."""
    found: list[dict[int, Tensor]] = []
    handles = [
        layer.feed_forward.experts.register_forward_pre_hook(
            lambda module, args: found.append(dict(enumerate(args[0].view(EXPERTS, -1, 32).detach())))
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        for ids in blocks_NT:
            model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    layers: list[dict[int, Tensor]] = [{}, {}]
    for place, calls in enumerate(found):
        for expert, rows in calls.items():
            held = layers[place % 2].get(expert, rows[:0])
            layers[place % 2][expert] = torch.cat([held, rows[rows.any(-1)]])
    return layers


def test_inputs_are_those_of_the_tokens_that_an_expert_gets() -> None:
    model, blocks_NT = llama4(), tokens(3, 12)
    expected, matrices = routed(model, blocks_NT), all_matrices(model)
    moments = measure_moments(model, matrices, blocks_NT)
    first = [matrix for matrix in matrices if matrix.expert is not None and "gate_up" in matrix.name]
    assert len(first) == 2 * EXPERTS
    counts = 0
    for matrix in first:
        rows = expected[matrix.weight.layer][matrix.expert]
        counts += len(rows)
        if len(rows):
            assert moments[matrix.name].count == len(rows)
            torch.testing.assert_close(moments[matrix.name].input_square_I, rows.square().sum(0), rtol=1e-4, atol=1e-6)
        else:
            assert matrix.name not in moments
    assert counts == 2 * blocks_NT.numel()  # each token goes to one expert of a layer
    for matrix in matrices:  # what goes back to unused rows is not counted
        if matrix.expert is not None and "down_proj" in matrix.name:
            up = matrix.name.replace("down_proj", "gate_up_proj")
            assert (matrix.name in moments) == (up in moments)
            if up in moments:
                assert moments[matrix.name].count == moments[up].count


def test_squares_of_a_graded_prior() -> None:
    model, blocks_NT = llama4(), tokens(1, 4)
    expected = routed(model, blocks_NT)
    found = measure_input_squares(model, find_weights(model), blocks_NT, progress=False)
    for layer, experts in enumerate(expected):
        squares = found[f"model.layers.{layer}.feed_forward.experts.gate_up_proj"]
        for expert, rows in experts.items():
            mean = rows.square().mean(0) if len(rows) else torch.ones(32)
            torch.testing.assert_close(squares[expert], mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm"])
def test_an_expert_without_tokens_is_pruned_by_magnitude(method: str, caplog: pytest.LogCaptureFixture) -> None:
    model, blocks_NT = llama4(), tokens(1, 4)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with caplog.at_level(logging.WARNING):
        pruned = prune(model, blocks_NT, method=method, pattern=0.5, progress=False)
    assert len(pruned.unseen) >= 2 * 2 * (EXPERTS - 4)
    assert pruned.unseen[0] in caplog.text
    for matrix in all_matrices(model):
        if matrix.name in pruned.unseen:
            kept, dense = (matrix.view(of[matrix.weight.name]) for of in (pruned.masks.masks, before))
            assert torch.equal(matrix.dense(), dense * kept)
            assert dense[kept].abs().min() >= dense[~kept].abs().max()


def test_hessians_are_of_the_same_rows() -> None:
    model, blocks_NT = llama4(), tokens(2, 12)
    expected = routed(model, blocks_NT)
    matrices = [[matrix for matrix in all_matrices(model) if matrix.weight.layer == layer] for layer in range(2)]
    compared = 0
    with Walk(model, blocks_NT, WalkOptions(keep=True)) as walk:
        for layer in walk:
            found = walk.observe(layer, matrices[layer], gram=True, advance=True)
            for matrix in matrices[layer]:
                if matrix.expert is not None and "gate_up" in matrix.name:
                    rows = expected[layer][matrix.expert]
                    assert (matrix.name in found) == bool(len(rows))
                    if len(rows):
                        assert found[matrix.name].count == len(rows)
                        torch.testing.assert_close(found[matrix.name].gram, rows.T @ rows, rtol=1e-3, atol=1e-5)
                        compared += 1
    assert compared > 2


def test_gradients_are_those_of_the_tokens_that_an_expert_gets() -> None:
    """A batched product has rows of every expert for every token; those that it does not get have gradients too."""
    model, blocks_NT = llama4(), tokens(3, 12)
    seen: list[tuple[Tensor, Tensor]] = []

    def see(module: torch.nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        seen.append((args[0].detach().view(EXPERTS, -1, args[0].shape[-1]).any(-1), output))

    for layer in model.model.layers:
        layer.feed_forward.experts.register_forward_hook(see)
    loss = model(input_ids=blocks_NT, labels=blocks_NT, use_cache=False).loss
    (loss * blocks_NT[:, 1:].numel()).backward()  # the sum over predicted tokens
    other, compared = llama4(), 0
    moments = measure_moments(other, all_matrices(other), blocks_NT)
    for layer, (used, output) in enumerate(seen):
        assert output.grad is not None
        gradients = output.grad.view(EXPERTS, -1, output.shape[-1])
        for expert in range(EXPERTS):
            name = f"model.layers.{layer}.feed_forward.experts.down_proj[{expert}]"
            if used[expert].any() and not used[expert].all():
                expected = gradients[expert][used[expert]].square().sum(0)
                torch.testing.assert_close(moments[name].gradient_square_O, expected, rtol=1e-3, atol=1e-8)
                compared += 1
    assert compared
