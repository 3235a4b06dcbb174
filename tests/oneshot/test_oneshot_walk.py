"""The walk over a model's blocks: its own forward replayed, and the statistics of every layer's inputs."""

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers
from matrices import all_matrices, tokens
from tiny import FAMILIES, tiny_model
from torch import Tensor

from leap_pl.base_model.weights import decoder_blocks, find_weights
from leap_pl.errors import UserError
from leap_pl.oneshot.fisher import measure_moments
from leap_pl.oneshot.inputs import InputStatistics, Matrix, sampled
from leap_pl.oneshot.prune import prune
from leap_pl.oneshot.walk import Walk, WalkOptions, _Collector


def of_layer(model: torch.nn.Module, index: int) -> list[Matrix]:
    return [m for m in all_matrices(model) if m.weight.layer == index]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_replays_the_models_own_forward(family: str) -> None:
    model = tiny_model(family)
    blocks_NT = tokens()  # 5 sequences in batches of 2: the last batch is smaller
    expected: list[Tensor] = []
    _, blocks = decoder_blocks(model)
    hook = blocks[-1].register_forward_hook(
        lambda module, args, output: expected.append(output if isinstance(output, Tensor) else output[0])
    )
    with torch.no_grad():
        model(input_ids=blocks_NT, use_cache=False)
    hook.remove()
    with Walk(model, blocks_NT, WalkOptions(batch_size=2)) as walk:
        for index in walk:
            walk.advance(index)
        final = torch.cat(walk.states)
    torch.testing.assert_close(final, expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_layers_inputs(family: str) -> None:
    model, blocks_NT = tiny_model(family), tokens()
    seen: dict[str, list[Tensor]] = {}
    weights = find_weights(model)
    for name, weight in weights.items():
        if weight.parameter.ndim == 2:
            weight.module.register_forward_pre_hook(
                lambda module, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2).double())
            )
    with torch.no_grad():
        model(input_ids=blocks_NT, use_cache=False)
    expected = {name: torch.cat(parts) for name, parts in seen.items()}
    with Walk(model, blocks_NT, WalkOptions(batch_size=2)) as walk:
        for index in walk:
            found = walk.observe(index, of_layer(model, index), gram=True)
            for matrix in of_layer(model, index):
                if matrix.expert is None:
                    x = expected[matrix.weight.name]
                    statistics = found[matrix.name]
                    assert statistics.count == len(x)
                    assert statistics.gram is not None
                    torch.testing.assert_close(statistics.gram.double(), x.T @ x, rtol=1e-4, atol=1e-3)
                    torch.testing.assert_close(
                        statistics.mean_square.double(), x.square().mean(0), rtol=1e-4, atol=1e-6
                    )
            walk.advance(index)


def test_experts_see_the_tokens_that_are_routed_to_them() -> None:
    model, blocks_NT = tiny_model("mixtral"), tokens()
    _, blocks = decoder_blocks(model)
    moe = blocks[0].mlp
    inputs: list[Tensor] = []
    moe.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    with Walk(model, blocks_NT) as walk:
        for index in walk:
            inputs.clear()
            found = walk.observe(index, of_layer(model, index), gram=True)
            break
    x = torch.cat(inputs)
    _, _, routes = moe.gate(x)
    for expert in range(3):
        routed = x[(routes == expert).any(1)].double()
        statistics = found[f"model.layers.0.mlp.experts.gate_up_proj[{expert}]"]
        assert statistics.count == len(routed)
        assert statistics.gram is not None
        torch.testing.assert_close(statistics.gram.double(), routed.T @ routed, rtol=1e-4, atol=1e-3)
        down = found[f"model.layers.0.mlp.experts.down_proj[{expert}]"]
        assert down.count == len(routed)


@pytest.mark.parametrize("again", [(0, 1), (1,), ()])
def test_blocks_that_do_not_run_once_each_are_refused(again: tuple[int, ...]) -> None:
    """A model that runs some of its blocks twice, or not all."""
    model = tiny_model("llama")
    inner, layers = model.model, list(model.model.layers)
    own = inner.forward

    def forward(*args: object, **kwargs: object) -> object:
        inner.layers = torch.nn.ModuleList(layers if again else layers[:1])
        output = own(*args, **kwargs)
        if again:
            inner.layers = torch.nn.ModuleList([layers[index] for index in again])
            own(*args, **kwargs)
        return output

    walk = Walk(model, tokens())
    inner.forward = forward
    with pytest.raises(UserError, match="does not run its blocks once each, in order"), walk:
        pass


def test_recording_holds_the_states_of_one_block() -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def note(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(weakref.ref(args[0]))
        alive.append(sum(one() is not None for one in seen))

    for block in model.model.layers:
        block.register_forward_pre_hook(note)
    with Walk(model, tokens(), WalkOptions(batch_size=5)):
        assert len(seen) == 12  # of two passes: the second has other tokens
        assert max(alive) <= 4  # the inputs of the first blocks, and those of the block that runs and of the one before


def test_matrices_with_one_input_share_their_statistics() -> None:
    model = tiny_model("llama")
    with Walk(model, tokens()) as walk:
        for index in walk:
            found = walk.observe(index, of_layer(model, index), gram=True)
    q, k, v, o, gate, up, down = (
        found[f"model.layers.1.{name}.weight"]
        for name in (
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
        )
    )
    assert q is k is v
    assert gate is up
    assert len({id(s) for s in (q, o, gate, down)}) == 4


def test_later_blocks_see_the_pruned_ones() -> None:
    model = tiny_model("llama")
    dense, blocks_NT = copy.deepcopy(model), tokens()
    prune(model, blocks_NT, method="wanda", pattern=0.5, progress=False)
    half = copy.deepcopy(dense)
    half.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    x: list[Tensor] = []
    half.model.layers[1].mlp.gate_proj.register_forward_pre_hook(lambda module, args: x.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        half(input_ids=blocks_NT)
    weight = dense.model.layers[1].mlp.gate_proj.weight
    scores = weight.detach().abs() * x[0].square().mean(0).sqrt()
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(16).indices, True)
    assert torch.equal(model.model.layers[1].mlp.gate_proj.weight != 0, kept)


@pytest.mark.parametrize("gram", [True, False])
def test_error_of_a_matrix_is_what_its_outputs_lose(gram: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, pruned = (torch.randn(rows, 12, generator=generator) for rows in (30, 7, 7))
    statistics = InputStatistics(wants_gram=gram)
    for part in x.split(10):
        statistics.add(part, sample=10)
    expected = (x.double() @ (pruned - weight).double().T).square().sum() / (
        x.double() @ weight.double().T
    ).square().sum()
    assert statistics.error(weight, pruned) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("length", [64, 128, 100])  # of which the first two divide the spacing of the draws
@pytest.mark.parametrize("first", [1.0, 30.0, 1000.0])
def test_a_layer_error_without_a_hessian_is_near_the_one_with_it(first: float, length: int) -> None:
    """Of 32 draws in 4,096 tokens, whatever share of all squares the first token of a sequence has."""
    generator = torch.Generator().manual_seed(length)
    dense = torch.randn(24, 16, generator=generator)
    pruned = dense * (torch.rand(24, 16, generator=generator) > 0.5)
    exact, estimated = InputStatistics(wants_gram=True), InputStatistics(wants_gram=False)
    for _ in range(16):
        inputs = torch.randn(4096 // length * length, 16, generator=generator)
        inputs[::length] = first * torch.tensor([1.0, *[0.02] * 15])  # on one input, as they are in trained models
        for statistics in (exact, estimated):
            statistics.add(inputs, sample=32)
    assert sum(map(len, estimated.sample)) == 16 * 32
    assert estimated.error(dense, pruned) == pytest.approx(exact.error(dense, pruned), rel=0.1)


def test_tokens_are_drawn_alike_whatever_data_type_is_the_default() -> None:
    """Lightning sets that to half precision in some runs, in which whole numbers above 256 run together."""
    inputs = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    energies = inputs.square().sum(1)
    expected = sampled(inputs, energies, 1000, 0.3)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        found = sampled(inputs, energies, 1000, 0.3)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, expected)


def test_all_tokens_are_kept_where_there_are_no_more_than_are_drawn() -> None:
    exact, kept = InputStatistics(wants_gram=True), InputStatistics(wants_gram=False)
    inputs, dense, pruned = torch.randn(9, 4), torch.randn(3, 4), torch.randn(3, 4)
    for part in (inputs[:5], inputs[5:], torch.zeros(40, 4)):
        exact.add(part, sample=5)
        kept.add(part, sample=5)
    assert torch.equal(torch.cat(kept.sample[:2]), inputs)
    assert kept.error(dense, pruned) == pytest.approx(exact.error(dense, pruned), rel=1e-5)


def test_statistics_of_several_inputs_of_a_matrix_are_told_apart_by_identity() -> None:
    """Two of equal counts, of a matrix that multiplies another one's input too."""
    collector = _Collector(False, 4)
    one, other = torch.ones(3, 5), torch.full((3, 5), 2.0)
    first, second = SimpleNamespace(name="first"), SimpleNamespace(name="second")
    collector(first, one)
    collector(second, other)
    collector(first, other)
    assert (collector.found["first"].count, collector.found["second"].count) == (6, 3)


def test_a_weight_that_stands_on_the_left_of_its_inputs_is_calibrated() -> None:
    """Mamba's mixer computes ``dt_proj.weight @ inputs``, with tokens in columns; by hand, of the first block."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=8, eos_token_id=256
    )
    model = transformers.MambaForCausalLM(config).eval()
    (matrix,) = [m for m in of_layer(model, 0) if m.name.endswith("dt_proj.weight")]
    ids = tokens(2, 12)
    seen = []
    mixer = model.backbone.layers[0].mixer
    handle = mixer.x_proj.register_forward_hook(lambda module, args, output: seen.append(output[..., :8]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    expected = torch.cat([part.reshape(-1, 8) for part in seen]).double()
    with Walk(model, ids, WalkOptions(keep=True)) as walk:
        found = walk.observe(0, [matrix], gram=False, advance=True)[matrix.name]
    assert found.count == len(expected)
    torch.testing.assert_close(found.mean_square.double(), expected.square().mean(0), rtol=1e-4, atol=1e-7)
    moments = measure_moments(model, [matrix], ids)[matrix.name]
    assert moments.gradient_square_O.shape == (matrix.weight.parameter.shape[0],)
    assert moments.input_square_I.shape == (8,)
    assert bool((moments.gradient_square_O > 0).any())
