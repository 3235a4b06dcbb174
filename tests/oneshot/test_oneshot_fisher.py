"""Fisher allocation: moments against plain hooks, costs against gradients of weights, densities against their mean."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import all_matrices, tokens
from tiny import FAMILIES, tiny_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from leap_pl.base_model.weights import find_weights
from leap_pl.errors import UserError
from leap_pl.oneshot.fisher import FisherOptions, Moments, balanced, fisher_allocation, log_cost, measure_moments
from leap_pl.oneshot.methods import METHODS
from leap_pl.oneshot.prune import prune
from leap_pl.oneshot.walk import WalkOptions

BLOCKS = tokens(5, 24)


def by_hooks(model: nn.Module, blocks_NT: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight name → Σx² and Σg², by hooks on modules and the model's own loss, in float64."""
    model = model.double()
    model.set_experts_implementation("eager")  # the others have no float64
    found: dict[str, list[Tensor]] = {}
    seen: list[tuple[str, Tensor, Tensor]] = []

    def keep(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            seen.append((name, args[0], output))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and f"{name}.weight" in find_weights(model):
            module.register_forward_hook(keep(f"{name}.weight"))
    for ids in blocks_NT:
        seen.clear()
        out = model(input_ids=ids[None], labels=ids[None], use_cache=False)
        (out.loss * (len(ids) - 1)).backward()
        for name, x, y in seen:
            assert y.grad is not None
            sums = [x.detach().flatten(0, -2).square().sum(0), y.grad.flatten(0, -2).square().sum(0)]
            found[name] = [a + b for a, b in zip(found[name], sums, strict=True)] if name in found else sums
    return {name: (x, g) for name, (x, g) in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_against_hooks(family: str) -> None:
    model = tiny_model(family)
    matrices = all_matrices(model)
    found = measure_moments(model, matrices, BLOCKS, WalkOptions(batch_size=2))
    expected = by_hooks(tiny_model(family), BLOCKS)
    assert expected
    for name, (x, g) in expected.items():
        assert found[name].count == 5 * 24
        torch.testing.assert_close(found[name].input_square_I.double(), x, rtol=1e-4, atol=0)
        torch.testing.assert_close(found[name].gradient_square_O.double(), g, rtol=1e-3, atol=1e-9)


def test_moments_of_stacked_experts() -> None:
    """Each token goes to two of three experts; gradients of their outputs are not all alike."""
    model = tiny_model("mixtral")
    stacked = [matrix for matrix in all_matrices(model) if matrix.expert is not None]
    found = measure_moments(model, stacked, BLOCKS)
    for part in ("gate_up_proj", "down_proj"):
        of_layer = [found[m.name] for m in stacked if m.weight.layer == 0 and part in m.name]
        assert sum(m.count for m in of_layer) == 2 * 5 * 24
        assert all(m.gradient_square_O.min() > 0 for m in of_layer)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_experts_without_tokens_are_left_out_and_get_the_overall_sparsity(sparsity: float) -> None:
    model = tiny_model("mixtral", num_local_experts=8)
    few = tokens(1, 3)
    matrices = all_matrices(model)
    unseen = {m.name for m in matrices} - measure_moments(model, matrices, few).keys()
    assert unseen
    allocated = fisher_allocation(model, matrices, few, sparsity)
    (found,) = {allocated[name].sparsity for name in unseen}
    assert found == pytest.approx(sparsity, abs=0.05)
    for matrix in matrices:
        if matrix.name in unseen:
            assert len(set(allocated[matrix.name].kept_rows.tolist())) == 1
    assert allocated.keys() == {m.name for m in matrices}


def test_cost_of_a_weight_is_its_gradient_times_the_weight() -> None:
    """Of one token the Fisher information does factor: ∂L/∂W_ij = g_i·x_j."""
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(4, 6, generator=generator, requires_grad=True), torch.randn(1, 6, generator=generator)
    y = x @ weight.T
    y.retain_grad()
    y.sin().square().sum().backward()
    moments = Moments()
    moments.add_inputs(x)
    moments.add_gradients(y.grad)
    expected = (weight.grad * weight.detach()).square().log()
    torch.testing.assert_close(log_cost(weight.detach(), moments, 1), expected, rtol=1e-4, atol=1e-4)


def test_cost_of_a_weight_is_per_token_of_the_text() -> None:
    """A matrix that saw 5 of 20 tokens: means of the inputs are over the 5, and of the gradients over the 20."""
    generator = torch.Generator().manual_seed(1)
    weight, x, g = (torch.randn(rows, 6, generator=generator, dtype=torch.float64) for rows in (4, 5, 5))
    moments = Moments()
    moments.add_inputs(x)
    moments.add_gradients(g[:, :4])
    expected = weight**2 * (x**2).mean(0) * ((g[:, :4] ** 2).sum(0) / 20)[:, None]
    torch.testing.assert_close(log_cost(weight, moments, 20), expected.log().float(), rtol=1e-5, atol=1e-5)


def test_an_expert_that_few_tokens_reach_is_pruned_more() -> None:
    """Two experts with the same weights, of which the router sends nearly all tokens to the first."""
    model = tiny_model("mixtral", seed=4, num_local_experts=2, num_experts_per_tok=1)
    with torch.no_grad():
        for block in model.model.layers:
            for stacked in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
                stacked[1] = stacked[0]
    stacked = [matrix for matrix in all_matrices(model) if matrix.expert is not None and matrix.weight.layer == 1]
    moments = measure_moments(model, all_matrices(model), BLOCKS)
    counts = {matrix.expert: moments[matrix.name].count for matrix in stacked}
    assert min(counts.values()) < 0.3 * BLOCKS.numel()
    allocated = fisher_allocation(model, all_matrices(model), BLOCKS, 0.5)
    fewer = min(counts, key=lambda expert: counts[expert])
    of = {matrix.expert: allocated[matrix.name].sparsity for matrix in stacked if "down" in matrix.name}
    assert of[fewer] > of[1 - fewer]


def test_the_model_is_as_it_was() -> None:
    model = tiny_model().train()
    model.lm_head.requires_grad_(False)
    before = {name: (p.data_ptr(), p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    measure_moments(model, all_matrices(model), BLOCKS)
    assert model.training
    for name, parameter in model.named_parameters():
        place, value, learned = before[name]
        assert parameter.data_ptr() == place
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == learned
        assert parameter.grad is None
    assert not model.get_input_embeddings()._forward_hooks


@given(
    odds=st.lists(st.floats(-12, 12), min_size=1, max_size=8),
    density=st.floats(0.02, 0.98),
    data=st.data(),
)
@settings(deadline=None)
def test_balanced(odds: list[float], density: float, data: st.DataObject) -> None:
    """Together they are what was asked for, and log-odds stay as far apart as they were."""
    log_odds = torch.tensor(odds, dtype=torch.float64)
    sizes = torch.tensor([data.draw(st.integers(1, 10_000)) for _ in odds], dtype=torch.float64)
    found = balanced(log_odds, sizes, density)
    assert float((found * sizes).sum() / sizes.sum()) == pytest.approx(density, abs=1e-9)
    shifts = found.logit() - log_odds
    assert float(shifts.max() - shifts.min()) < 1e-3


def test_strength_runs_from_even_to_one_cut_through_all_costs() -> None:
    model = tiny_model()
    matrices = all_matrices(model)
    moments = measure_moments(model, matrices, BLOCKS)
    costs = {m.name: log_cost(m.dense(), moments[m.name], BLOCKS.numel()) for m in matrices}
    cut = torch.cat([cost.flatten() for cost in costs.values()]).quantile(0.6)
    whole = fisher_allocation(model, matrices, BLOCKS, 0.6, FisherOptions(1.0, 1.0))
    for name, cost_OI in costs.items():
        assert whole[name].sparsity == pytest.approx(float((cost_OI <= cut).float().mean()), abs=2 / cost_OI.numel())
        # Half a weight for the finite log-odds of rows that keep all or nothing, half for the rounding.
        assert int((whole[name].kept_rows - (cost_OI > cut).sum(1)).abs().max()) <= 1
    sparsities = [pattern.sparsity for pattern in whole.values()]
    assert max(sparsities) - min(sparsities) > 0.05
    nearly = fisher_allocation(model, matrices, BLOCKS, 0.6, FisherOptions(1e-6, 0.0))
    assert all(pattern.sparsity == pytest.approx(0.6, abs=1e-4) for pattern in nearly.values())
    assert all(len(set(pattern.kept_rows.tolist())) == 1 for pattern in nearly.values())
    half = fisher_allocation(model, matrices, BLOCKS, 0.6, FisherOptions(0.5))
    odds = [[math.log(1 / pattern.sparsity - 1) for pattern in found.values()] for found in (half, whole)]
    for one, other in zip(*(torch.tensor(found).diff().tolist() for found in odds), strict=True):
        assert one == pytest.approx(0.5 * other, abs=0.01)  # log-odds of densities, but for one shift of all
    for name, pattern in half.items():
        ends = (0.6, whole[name].sparsity)
        assert min(ends) - 0.05 < pattern.sparsity < max(ends) + 0.05
        rows = pattern.kept_rows.double() / costs[name].shape[1]
        assert abs(float(rows.mean()) - (1 - pattern.sparsity)) <= 0.5 / costs[name].shape[1]


def test_rows_go_their_own_share_of_the_way() -> None:
    """In log-odds, from the density of their matrix to that of one cut through all costs."""
    model = tiny_model()
    matrices = all_matrices(model)
    moments = measure_moments(model, matrices, BLOCKS)
    costs = {m.name: log_cost(m.dense(), moments[m.name], BLOCKS.numel()) for m in matrices}
    cut = torch.cat([cost.flatten() for cost in costs.values()]).quantile(0.6)
    apart = 0
    for strength, rows in ((0.5, 0.25), (0.25, 1.0)):
        found = fisher_allocation(model, matrices, BLOCKS, 0.6, FisherOptions(strength, rows))
        for name, cost_OI in costs.items():
            size = cost_OI.shape[1]
            kept = (cost_OI > cut).sum(1).double()
            odds = rows * ((kept + 0.5) / (size - kept + 0.5)).log()
            low, high = -50.0, 50.0  # the shift of all rows at which their mean is the density of the matrix
            for _ in range(80):
                middle = (low + high) / 2
                below = float(torch.sigmoid(odds + middle).mean()) < 1 - found[name].sparsity
                low, high = (middle, high) if below else (low, middle)
            expected = size * torch.sigmoid(odds + middle)
            assert float((found[name].kept_rows - expected).abs().max()) <= 0.5 + 1.0  # a weight at the cut
            apart = max(apart, int(found[name].kept_rows.max() - found[name].kept_rows.min()))
    assert apart > 8


def test_what_does_not_reach_the_loss_goes_first() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e-3)
    allocated = fisher_allocation(model, all_matrices(model), BLOCKS, 0.5)
    sparsest = max(allocated, key=lambda name: allocated[name].sparsity)
    assert sparsest.startswith("model.layers.1.self_attn")


@pytest.mark.parametrize("method", ["magnitude", "wanda", "admm"])
def test_pruned_to_the_allocation(method) -> None:
    model = tiny_model()
    matrices = all_matrices(model)
    allocated = fisher_allocation(model, matrices, BLOCKS, 0.5)
    masks = prune(model, BLOCKS, method=method, pattern=0.5, fisher=FisherOptions(), progress=False).masks
    for matrix in matrices:
        mask_OI = masks.masks[matrix.name]
        if method == "wanda":
            assert torch.equal(mask_OI.sum(1), allocated[matrix.name].kept_rows)
        else:
            kept = (1 - allocated[matrix.name].sparsity) * mask_OI.numel()
            assert abs(int(mask_OI.sum()) - kept) <= 0.5 + 1e-6
    rows = 0.25 if METHODS[method].by_row else 0.0  # else no weights compete within a row
    assert masks.provenance.config["fisher"] == {"strength": 0.5, "row_strength": rows, "sequences": 32}
    assert masks.provenance.sparsity == pytest.approx(masks.sparsity, abs=1e-6)


def test_sequences_are_a_limit() -> None:
    model = tiny_model()
    matrices = all_matrices(model)
    some = fisher_allocation(model, matrices, BLOCKS, 0.5, FisherOptions(sequences=2))
    fewer, more = (fisher_allocation(model, matrices, blocks, 0.5) for blocks in (BLOCKS[:2], BLOCKS))
    assert [p.sparsity for p in some.values()] == [p.sparsity for p in fewer.values()]
    assert [p.sparsity for p in some.values()] != [p.sparsity for p in more.values()]


def test_weights_whose_products_are_not_seen() -> None:
    model = tiny_model()
    matrices = all_matrices(model)
    with pytest.raises(
        UserError, match=r"layers\.0.*no product with it was seen.*Give --fisher null, or leave it out with --ign"
    ):
        model.model.layers[0].self_attn.q_proj.forward = lambda x: x
        measure_moments(model, matrices, BLOCKS)


def test_gradients_that_are_not_finite() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        measure_moments(model, all_matrices(model), BLOCKS)


@pytest.mark.parametrize("changes", [{"strength": 0.0}, {"strength": 1.1}, {"row_strength": -0.1}, {"sequences": 0}])
def test_settings_that_make_no_sense(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Fisher allocation"):
        FisherOptions(**changes)  # type: ignore[arg-type]
