"""NMGate: the formula and its gradient, groups and short groups, hard masks, priors, the whole run."""

import copy
from itertools import combinations
from math import comb
from typing import Any

import pytest
import torch
from bare_gates import IDS, PLACES, is_exact, nm_gate, state_at
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny import FAMILIES, tiny_model
from torch import Tensor, nn

from benchmarks.published_nm import PublishedNM
from benchmarks.references import pattern_mask
from leap_pl.base_model.weights import Weight, find_weights
from leap_pl.errors import UserError
from leap_pl.gates import Gates, GateState, NMGate, Stored, attach, detach, restore
from leap_pl.gates import pattern_kernels as kernels
from leap_pl.gates.groups import Groups, first_highest
from leap_pl.kernels import compiled as compiling
from leap_pl.kernels.noise import columns, element_bits, gumbel
from leap_pl.masks import MaskSet, Provenance
from leap_pl.masks.patterns import NM, choose

pytestmark = pytest.mark.usefixtures("eager")

ANNEALED = [(100.0, 4.0), (25.0, 1.0), (500.0, 0.05), (0.0, 1.0)]


# -- the formula ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dim"), PLACES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (2, 5), (4, 8)])
def test_values_and_gradients_against_float64(shape: tuple[int, ...], dim: int, n: int, m: int) -> None:
    """softmax((αθ + g)/τ) over the patterns written out, and its gradient by autograd."""
    for case, (alpha, tau) in enumerate(ANNEALED):
        dtype = (torch.float32, torch.bfloat16)[case % 2]
        random = torch.Generator().manual_seed(case)
        gate = nm_gate(shape, n, m, dim=dim, state=state_at(alpha, tau, seed=2, step=7, micro_batch=1))
        gate.start_from(None, seed=case)
        weight = torch.randn(shape, generator=random).to(dtype)
        upstream = torch.randn(shape, generator=random).to(dtype)
        masked = gate(weight)
        assert gate.kept is not None
        ((masked * upstream).sum().float() + 0.3 * gate.energy).backward()

        theta = gate.logits.detach().double().requires_grad_()
        mask = pattern_mask(gate, theta)
        expected = mask * weight.double()
        ((expected * upstream.double()).sum() + 0.3 * (expected**2).sum()).backward()
        assert (masked.dtype, masked.shape) == (dtype, torch.Size(shape))
        assert masked.is_contiguous()
        rounding = {torch.float32: 1e-3, torch.bfloat16: 2**-7}[dtype]
        torch.testing.assert_close(masked.double(), expected.detach(), rtol=rounding, atol=1e-5)
        torch.testing.assert_close(gate.kept.double(), mask.sum().detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(gate.energy.double(), (expected**2).sum().detach(), rtol=1e-4, atol=0)
        assert gate.logits.grad is not None
        assert theta.grad is not None
        # The gradient is P·(a difference of the mask's gradients)·α/τ, and the difference is rounded at their size.
        size = (upstream.double() * weight.double()).abs().max() + 0.6 * weight.double().square().max()
        allowed = 1e-5 * theta.grad.abs().max() + 4e-7 * size * alpha / tau
        assert (gate.logits.grad.double() - theta.grad).abs().max() <= allowed


def test_both_kinds_of_kernel_agree() -> None:
    """A few patterns written out in one pass, and many in several."""
    groups = Groups(2, 4, torch.Size((6, 16)), 1)
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 24, generator=random) * 0.05
    weight, upstream = (groups.split(torch.randn(6, 16, generator=random)) for _ in range(2))
    keys = torch.tensor(3, dtype=torch.int32), torch.tensor(-5, dtype=torch.int32)
    noise = columns(24, logits.device), *keys, torch.tensor(20.0), torch.tensor(0.5)
    found = []
    tile = torch.rand(24, generator=random)
    for kind in (kernels._few_patterns(groups.patterns, False), kernels._many_patterns(groups.patterns)):
        for over in (None, tile):
            found.append([*kind.forward(logits, weight, over, *noise)])
            found[-1] += kind.backward(logits, weight, over, upstream, torch.tensor(0.3), *noise)
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-5, atol=1e-6)
    assert found[0][3] is None
    assert not torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize(("alpha", "tau"), ANNEALED)
def test_one_of_two_is_a_two_way_softmax(alpha: float, tau: float) -> None:
    """1:2: the first weight of a pair stays with σ of the difference of its scores, the second with the rest."""
    gate = nm_gate((4, 10), 1, 2, state=state_at(alpha, tau, step=3))
    gate.start_from(None, seed=1)
    noise = gumbel(element_bits(2, columns(20, gate.logits.device), *gate.keys()))
    score = (alpha * gate.logits.detach().reshape(2, -1).double() + noise.double()) / tau
    first = torch.sigmoid(score[0] - score[1])
    mask = gate(torch.ones(4, 10)).detach().double()
    torch.testing.assert_close(mask, torch.stack([first, 1 - first], 1).view(4, 10), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("shape", "dim"), PLACES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_without_temperature_the_mask_is_hard_and_exact(shape: tuple[int, ...], dim: int, n: int, m: int) -> None:
    gate = nm_gate(shape, n, m, dim=dim, state=state_at(100.0, 1e-9))
    gate.start_from(None, seed=0)
    weight = torch.randn(shape)
    masked = gate(weight)
    assert is_exact(masked != 0, dim, n, m)
    assert torch.equal(masked[masked != 0], weight[masked != 0])
    assert gate.kept == (masked != 0).sum()


def test_the_mean_mask_at_the_start_is_the_density() -> None:
    """Without a prior every position is kept as often as any other."""
    gate = nm_gate((400, 400), state=state_at(100.0, 4.0))
    gate.start_from(None, seed=0)
    mask = gate(torch.ones(400, 400)).detach().view(-1, 4)
    torch.testing.assert_close(mask.sum(1), torch.full((40_000,), 2.0), rtol=1e-5, atol=0)
    assert (mask.mean(0) - 0.5).abs().max() < 4 * 0.3 / 40_000**0.5


def test_the_published_formulation_is_the_same_mask() -> None:
    """The one that benchmarks compare with, over many draws: the same mean and spread of every weight's mask."""
    state = state_at(100.0, 1.0)
    ours = nm_gate((2, 8), state=state)
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(2, 8), requires_grad=False)
    theirs = PublishedNM(Weight("w", module, "weight", None, "w", 1), state)
    ours.start_from(None, seed=0)
    theirs.logits.data.copy_(ours.logits.detach().reshape(6, -1).T)
    torch.manual_seed(0)
    draws: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
    with torch.no_grad():
        for step in range(3000):
            state.step = step
            for name, gate in (("ours", ours), ("theirs", theirs)):
                draws[name].append(gate(torch.ones(2, 8)))
    one, other = (torch.stack(masks) for masks in draws.values())
    assert (one.mean(0) - other.mean(0)).abs().max() < 5 * (2 / 3000) ** 0.5 * 0.5
    assert (one.std(0) - other.std(0)).abs().max() < 0.03


def test_fresh_noise_for_every_seed_step_micro_batch_and_tensor() -> None:
    def mask(name: str = "w", **kw: int) -> Tensor:
        return nm_gate((8, 8), name=name, state=state_at(100.0, 4.0, **kw))(torch.ones(8, 8)).detach()

    masks = [mask(), mask(seed=1), mask(step=1), mask(micro_batch=1), mask(name="v")]
    for i, one in enumerate(masks):
        assert all((one != other).float().mean() > 0.9 for other in masks[i + 1 :])
    assert torch.equal(mask(), masks[0])


def test_annealing_between_forward_and_backward_changes_nothing() -> None:
    found = []
    for disturb in (False, True):
        state = state_at(100.0, 1.0)
        gate = nm_gate((8, 8), state=state)
        loss = gate(torch.ones(8, 8)).square().sum() + gate.energy
        if disturb:
            state.anneal(350.0, 0.05)
            state.step, state.micro_batch, state.seed = 5, 1, 9
        loss.backward()
        found.append(gate.logits.grad)
    assert torch.equal(found[0], found[1])


def test_patterns_that_a_short_group_cannot_take_never_move() -> None:
    gate = nm_gate((3, 6), state=state_at(100.0, 4.0))
    gate.start_from(torch.rand(3, 6) < 0.5, seed=0)
    start = gate.logits.detach().clone()
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        (gate(torch.randn(3, 6)).sum() + gate.energy).backward()
        optimizer.step()
    moved = gate.logits.detach() != start
    forbidden = start < -1e6
    assert forbidden.sum() == 3 * (6 - 2)  # of two inputs one stays: two patterns
    assert not moved[forbidden].any()
    assert moved[~forbidden].all()


def test_settings_that_make_no_sense() -> None:
    for wrong in ({"spread": 0.0}, {"strength": -1.0}):
        with pytest.raises(ValueError, match=r"^model\.gate\.(spread|strength|pattern_spread) is .*; give "):
            nm_gate((2, 4), **wrong)
    for n, m in [(4, 4), (5, 4), (0, 4), (-1, 4), (1, 1), (1, 0)]:
        with pytest.raises(UserError, match=f"pattern {n}:{m} is invalid"):
            nm_gate((2, 4), n, m)
    with pytest.raises(UserError, match="12,870 patterns"):
        nm_gate((2, 16), 8, 16)
    gate = nm_gate((2, 12), 1, 3, spread=0.1, strength=2.0)
    assert gate.settings() == {"n": 1, "m": 3, "spread": 0.1, "strength": 2.0}
    gates = Gates.of({"w": gate})
    assert gates.exact_sparsity(0.667) == 2 / 3
    with pytest.raises(UserError, match=r"sparsity is 0.5, and 1:3 gates remove 0.666667. Set --model.sparsity 0.66"):
        gates.exact_sparsity(0.5)


# -- compiled ---------------------------------------------------------------------------------------------


def test_compiled_kernels_are_the_eager_ones_and_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At several sizes, while α, τ and the keys change."""
    monkeypatch.delenv("LEAP_PL_COMPILE")
    if not compiling.can_compile(torch.device("cpu")):
        pytest.skip("torch.compile does not work here")

    def run(shape: tuple[int, ...], step: int, alpha: float, tau: float) -> list[Tensor]:
        gate = nm_gate(shape, name=f"w{shape}", state=state_at(alpha, tau, step=step, seed=step))
        gate.start_from(None, seed=0)
        random = torch.Generator().manual_seed(step)
        masked = gate(torch.randn(shape, generator=random))
        ((masked * torch.randn(shape, generator=random)).sum() + 0.7 * gate.energy).backward()
        assert gate.logits.grad is not None
        return [masked.detach(), gate.energy.detach(), gate.logits.grad]

    shapes = [(160, 160), (257, 516), (3, 82, 268), (160, 160), (515, 129)]
    cases = [(s, i, *ANNEALED[i % len(ANNEALED)]) for i, s in enumerate(shapes)]
    found = [run(*cases[0])]
    assert {"nm_forward_2_of_4[cpu]", "nm_backward_2_of_4[cpu]"} <= set(compiling.compile_seconds())
    with torch._dynamo.config.patch(error_on_recompile=True):
        found += [run(*case) for case in cases[1:]]
    monkeypatch.setenv("LEAP_PL_COMPILE", "0")
    for case, results in zip(cases, found, strict=True):
        for compiled, expected in zip(results, run(*case), strict=True):
            torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


# -- the start --------------------------------------------------------------------------------------------


def test_the_start_leans_towards_the_patterns_that_share_positions_with_the_prior() -> None:
    """θ = N(0, spread²) + strength·spread·(shared positions − 1), as in MaskLLM, for 2:4."""
    prior = choose(torch.rand(200, 400, generator=torch.Generator().manual_seed(0)), NM(2, 4), "row")
    gate = nm_gate((200, 400), spread=0.02, strength=3.0)
    gate.start_from(prior, seed=0)
    logits = gate.logits.detach().reshape(6, -1).double()
    kept = prior.view(-1, 4)
    shared = torch.stack([kept[:, list(p)].sum(1) for p in combinations(range(4), 2)])
    for agreement in (0, 1, 2):
        lean = 3.0 * (agreement - 1)
        assert stats.kstest(logits[shared == agreement] / 0.02, stats.norm(lean).cdf).pvalue > 1e-3
    agrees = (gate.hard_mask() == prior).double().mean()
    assert agrees > 0.97
    gate.start_from(None, seed=0)
    assert stats.kstest(gate.logits.detach().flatten().double() / 0.02, stats.norm.cdf).pvalue > 1e-3


def test_the_confidence_of_patterns_is_at_the_slope_of_the_state() -> None:
    gate = nm_gate((6, 16), state=state_at(7.0, 0.5))
    gate.logits.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    confident = (gate.logits.detach().reshape(6, -1) * 7.0 / 0.5).softmax(0).amax(0).mean()
    assert Gates.of({"w": gate}).curves(1) == {"patterns/confidence": pytest.approx(float(confident), rel=1e-5)}
    some = (gate.logits.detach().reshape(6, -1)[:, ::3] * 7.0 / 0.5).softmax(0).amax(0).mean()
    assert Gates.of({"w": gate}).curves(3) == {"patterns/confidence": pytest.approx(float(some), rel=1e-5)}
    assert abs(float(some - confident)) > 1e-3


@pytest.mark.parametrize(("shape", "dim"), PLACES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 5), (4, 8)])
def test_a_strong_prior_is_the_hard_mask_at_the_start(shape: tuple[int, ...], dim: int, n: int, m: int) -> None:
    """And a one-shot mask of the same pattern, short groups included, is one that the gate can take."""
    score = torch.rand(shape, generator=torch.Generator().manual_seed(1)).movedim(dim, -1)
    rows = choose(score.reshape(-1, score.shape[-1]), NM(n, m), "row")
    prior = rows.view(score.shape).movedim(-1, dim)
    assert is_exact(prior, dim, n, m)
    gate = nm_gate(shape, n, m, dim=dim, strength=30.0)
    gate.start_from(prior, seed=0)
    assert torch.equal(gate.hard_mask(), prior)
    assert gate.groups.kept == prior.sum()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_a_mask_is_the_same_under_autocast(n: int, m: int) -> None:
    gate, weight = nm_gate((6, 16), n, m), torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    gate.start_from(None, 0)
    expected = gate(weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(weight), expected)


def test_the_start_depends_on_seed_and_name_alone() -> None:
    def start(name: str, seed: int) -> Tensor:
        gate = nm_gate((4, 8), name=name)
        gate.start_from(None, seed)
        return gate.logits.detach()

    assert torch.equal(start("a", 0), start("a", 0))
    assert not torch.equal(start("a", 0), start("a", 1))
    assert not torch.equal(start("a", 0), start("b", 0))


# -- hard masks -------------------------------------------------------------------------------------------


@st.composite
def gates(draw: st.DrawFn) -> NMGate:
    """A gate of any n:m on a tensor of any shape, with many equal logits."""
    m = draw(st.integers(2, 7))
    n = draw(st.integers(1, m - 1))
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=3)))
    gate = nm_gate(shape, n, m, dim=draw(st.integers(0, len(shape) - 1)))
    gate.start_from(None, 0)
    values = torch.tensor([-0.2, -0.0, 0.0, 0.1])
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    drawn = values[torch.randint(0, 4, gate.logits.shape, generator=random)]
    with torch.no_grad():
        gate.logits.copy_(torch.where(gate.logits < -1e6, gate.logits, drawn))
    return gate


@settings(max_examples=150, deadline=None)
@given(gates(), st.integers(1, 11))
def test_hard_masks_keep_exactly_n_of_every_m(gate: NMGate, stride: int) -> None:
    Gates.of({"w": gate}).choose(0.5)
    mask = gate.hard_mask()
    assert mask.shape == gate.shape
    assert is_exact(mask, gate.input_dim, gate.n, gate.m)
    assert int(mask.sum()) == gate.groups.kept
    sample = Gates.of({"w": gate}).sample_hard_masks(0.5, stride)["w"]
    assert torch.equal(sample, mask.reshape(-1)[::stride])
    with gate.state.passing("hard"):
        assert torch.equal(gate(torch.full(gate.shape, -2.0)), torch.where(mask, -2.0, 0.0))
    # The pattern is the likeliest of its group, of equal ones the first.
    logits = gate.logits.detach().reshape(comb(gate.m, gate.n), -1)
    for column, index in zip(logits.T, first_highest(logits), strict=True):
        assert column[index] == column.max()
        assert not (column[:index] == column.max()).any()


def test_restored_gates_choose_as_the_gates_did() -> None:
    model = tiny_model("mixtral")
    weights = find_weights(model)
    found = attach(weights, NMGate, GateState())
    for gate in found.values():
        gate.start_from(None, seed=0)
    stored = {
        name: Stored(gate.stored()["logits"].clone(), tuple(gate.shape), weights[name].input_dim)
        for name, gate in found.items()
    }
    restored = restore("NMGate", {"n": 2, "m": 4}, stored)
    for name, gate in found.items():
        assert torch.equal(restored[name].hard_mask(), gate.hard_mask())
    with pytest.raises(UserError, match=r"stored logits of shape \(6, .*; expected shape \(4, "):
        restore("NMGate", {"n": 1, "m": 4}, stored)


def hard_2_4(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """A weight under the hard mask of a gate, half precision, and the mask."""
    gate = nm_gate((outputs, inputs))
    gate.start_from(None, seed=0)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).half()
    with gate.state.passing("hard"):
        return gate(weight), gate.hard_mask()


def test_two_of_four_is_what_sparse_tensor_cores_take() -> None:
    """Two values and two 2-bit positions for each four weights hold all of it."""
    weight, mask = hard_2_4(64, 128)
    positions = mask.view(-1, 4).nonzero()[:, 1].view(-1, 2)  # fails to view where a group does not keep two
    packed = weight.view(-1, 4).gather(1, positions)
    again = torch.zeros_like(weight).view(-1, 4).scatter_(1, positions, packed).view_as(weight)
    assert torch.equal(again, weight)
    assert (positions[:, 0] < positions[:, 1]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="semi-structured kernels need a GPU of Ampere or later")
def test_two_of_four_runs_semi_structured() -> None:
    weight, _ = hard_2_4(128, 256)
    weight = weight.cuda()
    sparse = torch.sparse.to_sparse_semi_structured(weight)
    assert torch.equal(sparse.to_dense(), weight)
    inputs = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).half().cuda()
    product = torch.nn.functional.linear(inputs, sparse)
    torch.testing.assert_close(product, torch.nn.functional.linear(inputs, weight), rtol=2e-3, atol=2e-2)


# -- on a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_model_every_logit_learns_and_hard_is_the_applied_mask(family: str) -> None:
    model: Any = tiny_model(family).requires_grad_(False)
    plain = copy.deepcopy(model)
    weights, state = find_weights(model), state_at(100.0, 1.0, seed=3)
    found = attach(weights, NMGate, state)
    for gate in found.values():
        gate.start_from(None, seed=0)

    def loss_now() -> Tensor:
        lm = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        return lm - 0.05 * torch.stack([gate.energy for gate in found.values()]).sum()

    loss = loss_now()
    loss.backward()
    norm = torch.tensor(0.0)
    for gate in found.values():
        assert gate.logits.grad is not None
        assert gate.logits.grad.isfinite().all()
        assert gate.logits.grad.any()
        norm += gate.logits.grad.square().sum()
    with torch.no_grad():
        step = 0.003 / norm.sqrt()
        for gate in found.values():
            gate.logits -= step * gate.logits.grad
        after = loss_now()
    predicted = step * norm
    assert 0.5 * predicted < loss - after < 1.5 * predicted
    masks = {name: gate.hard_mask() for name, gate in found.items()}
    assert all(is_exact(mask, weights[name].input_dim, 2, 4) for name, mask in masks.items())
    with torch.no_grad(), state.passing("hard"):
        hard = model(IDS).logits
    detach(weights)
    pruned = MaskSet(masks, Provenance("tiny", "", "maskllm")).apply_(plain, check=False)
    assert torch.equal(hard, pruned(IDS).logits)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_activation_checkpointing_gives_bit_equal_gradients(family: str) -> None:
    found = []
    for checkpointing in (False, True):
        model: Any = tiny_model(family).requires_grad_(False).train()
        gates = attach(find_weights(model), NMGate, state_at(100.0, 1.0))
        for gate in gates.values():
            gate.start_from(None, seed=0)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        (loss - 0.05 * torch.stack([g.energy for g in gates.values()]).sum()).backward()
        found.append([gate.logits.grad for gate in gates.values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_logits_keep_every_bit_when_the_model_is_cast() -> None:
    model = tiny_model().requires_grad_(False)
    gates = attach(find_weights(model), NMGate, GateState())
    for gate in gates.values():
        gate.start_from(None, seed=0)
    before = {name: gate.logits.detach().clone() for name, gate in gates.items()}
    model.bfloat16()
    assert all(gate.logits.dtype == torch.float32 for gate in gates.values())
    assert all(torch.equal(gate.logits, before[name]) for name, gate in gates.items())
