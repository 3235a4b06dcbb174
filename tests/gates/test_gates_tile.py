"""TileGate: the formula and its gradients in both modes, its limits, exact hard masks, the whole run."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from bare_gates import IDS, PLACES, nm_gate, state_at
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.references import pattern_mask, soft_mask
from leap_pl.base_model.weights import Weight, find_weights
from leap_pl.errors import UserError
from leap_pl.gates import BernoulliGate, Gates, GateState, Stored, TileGate, attach, restore
from leap_pl.gates.tile import PATTERNS
from leap_pl.kernels import compiled as compiling
from leap_pl.kernels.noise import columns, element_bits, logistic
from leap_pl.masks.patterns import NM, Tiled, Unstructured, choose, follows

pytestmark = pytest.mark.usefixtures("eager")


def weight_of(shape: tuple[int, ...], dim: int | None, name: str = "w") -> Weight:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(shape), requires_grad=False)
    return Weight(name, module, "weight", None, name, len(shape) - 1 if dim is None else dim)


def tile_gate(shape: tuple[int, ...], *, dim: int | None = None, name: str = "w", **kw: Any) -> TileGate:
    return TileGate(weight_of(shape, dim, name), kw.pop("state", None) or GateState(), **{"tile": 4, **kw})


def nm_mask(shape: tuple[int, ...], dim: int, n: int = 2, m: int = 4, seed: int = 0) -> Tensor:
    """A random n:m mask."""
    score = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).movedim(dim, -1)
    mask = choose(score.reshape(-1, score.shape[-1]), NM(n, m), "row").view(score.shape)
    return mask.movedim(-1, dim)


def tiles_of(tensor: Tensor, dim: int, size: int) -> list[Tensor]:
    """The tiles of a tensor of the weight's shape, matrix by matrix, row by row."""
    rows = tensor.movedim(dim, -1)
    matrices = rows.reshape(-1, *rows.shape[-2:])
    return [t for x in matrices for band in x.split(size, 0) for t in band.split(size, 1)]


def spread_by_hand(values: Tensor, shape: tuple[int, ...], dim: int, size: int) -> Tensor:
    """The value of each element's tile, found element by element."""
    out = torch.empty(shape, dtype=values.dtype).movedim(dim, -1)
    for place in torch.cartesian_prod(*[torch.arange(s) for s in out.shape]).tolist():
        *stacked, row, column = place
        out[tuple(place)] = values[(*stacked, row // size, column // size)]
    return out.movedim(-1, dim)


# -- the formula ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["tile", "joint"])
@pytest.mark.parametrize(("shape", "dim"), PLACES)
@pytest.mark.parametrize(("n", "m", "size"), [(2, 4, 4), (1, 4, 8), (2, 3, 3), (4, 8, 8)])
def test_values_and_gradients_against_float64(mode, shape, dim: int, n: int, m: int, size: int) -> None:
    """M = T + (1 − T)·m written out, and its gradients by autograd, for both sums and the weight."""
    for case, (alpha, tau) in enumerate([(25.0, 4.0), (100.0, 1.0), (350.0, 0.5)]):
        dtype = (torch.float32, torch.bfloat16)[case % 2]
        random = torch.Generator().manual_seed(case)
        state = state_at(alpha, tau, seed=2, step=7, micro_batch=1)
        gate = tile_gate(shape, dim=dim, state=state, n=n, m=m, tile=size, mode=mode)
        inner = nm_mask(shape, dim, n, m, case)
        gate.start_from(None, seed=case, inner=inner)
        weight, upstream = (torch.randn(shape, generator=random).to(dtype) for _ in range(2))
        masked = gate(weight)
        assert gate.kept is not None
        ((masked * upstream).sum().float() + 0.2 * gate.kept + 0.3 * gate.energy).backward()

        theta = gate.logits.detach().double().requires_grad_()
        bits = element_bits(theta.flatten(0, -2).shape[0], columns(theta.shape[-1], theta.device), *gate.keys())
        soft = torch.sigmoid((alpha * theta + logistic(bits).double().view(theta.shape)) / tau)
        low = inner.double()
        learned: dict[str, Tensor] = {"logits": theta}
        if mode == "joint":
            inner_state = state_at(100.0, tau, seed=2, step=7, micro_batch=1)
            alone = nm_gate(shape, n, m, dim=dim, name=f"w{PATTERNS}", state=inner_state)
            learned["pattern_logits"] = gate.pattern_logits.detach().double().requires_grad_()
            low = pattern_mask(alone, learned["pattern_logits"])
        over = spread_by_hand(soft, shape, dim, size)
        mask = over + (1 - over) * low
        torch.testing.assert_close(soft_mask(gate, learned), mask)  # as benchmarks.gpu has it
        expected = mask * weight.double()
        ((expected * upstream.double()).sum() + 0.2 * mask.sum() + 0.3 * (expected**2).sum()).backward()
        rounding = {torch.float32: 1e-4, torch.bfloat16: 2**-7}[dtype]
        assert masked.is_contiguous()
        assert masked.dtype == dtype
        torch.testing.assert_close(masked.double(), expected.detach(), rtol=rounding, atol=1e-5)
        torch.testing.assert_close(gate.kept.double(), mask.sum().detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(gate.energy.double(), (expected**2).sum().detach(), rtol=1e-4, atol=0)
        assert set(learned) == {name for name, _ in gate.named_parameters()}
        for name, reference in learned.items():
            grad = getattr(gate, name).grad
            assert reference.grad is not None
            assert (grad.double() - reference.grad).abs().max() <= 2e-4 * reference.grad.abs().max()


def test_tiles_of_one_weight_over_an_all_zero_mask_are_the_bernoulli_gate() -> None:
    """Logits at the start, soft weight, sums and gradients, and the hard mask."""
    shape = (9, 14)
    prior = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    for alpha, tau in [(25.0, 4.0), (100.0, 1.0), (350.0, 0.05)]:
        state = state_at(alpha, tau, seed=1, step=2)
        tiles = tile_gate(shape, state=state, tile=1, mode="tile")
        plain = BernoulliGate(weight_of(shape, None), state)
        tiles.removable.fill_(1)  # what an all-zero mask leaves out, which is no 2:4 mask
        for gate in (tiles, plain):
            gate.start_from(prior, seed=3)
        assert torch.equal(tiles.logits, plain.logits)
        weight, upstream = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
        found = []
        for gate in (tiles, plain):
            masked = gate(weight)
            assert gate.kept is not None
            ((masked * upstream).sum() + 0.3 * gate.kept + 0.7 * gate.energy).backward()
            found.append([masked.detach(), gate.kept.detach(), gate.energy.detach(), gate.logits.grad])
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5 * alpha / tau)
        Gates.of({"w": tiles}).choose(0.6)
        Gates.of({"w": plain}).choose(0.6)
        assert torch.equal(tiles.hard_mask(), plain.hard_mask())


@pytest.mark.parametrize("mode", ["tile", "joint"])
def test_dense_tiles_and_none_are_the_limits(mode: str) -> None:
    """All tiles far open: the weight itself. All far shut: the n:m gate's masked weight."""
    weight = torch.randn(8, 12)
    gate = tile_gate((8, 12), state=state_at(100.0, 1.0, step=4), mode=mode)
    inner = nm_mask((8, 12), 1)
    gate.start_from(None, seed=0, inner=inner)
    with torch.no_grad():
        gate.logits.fill_(10)
        torch.testing.assert_close(gate(weight), weight)
        assert gate.kept == 96
        gate.logits.fill_(-10)
        expected = weight * inner
        if mode == "joint":
            alone = nm_gate((8, 12), name=f"w{PATTERNS}", state=gate.state)
            alone.logits.copy_(gate.pattern_logits)
            expected = alone(weight)
        torch.testing.assert_close(gate(weight), expected)
        assert gate.kept == 48


@pytest.mark.parametrize("mode", ["tile", "joint"])
def test_compiled_kernels_are_the_eager_ones(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEAP_PL_COMPILE")
    if not compiling.can_compile(torch.device("cpu")):
        pytest.skip("torch.compile does not work here")

    def run(shape: tuple[int, ...], step: int) -> list[Tensor]:
        gate = tile_gate(shape, state=state_at(100.0, 0.5 + step, step=step), mode=mode, tile=32)
        gate.start_from(None, seed=0, inner=nm_mask(shape, 1))
        random = torch.Generator().manual_seed(step)
        masked = gate(torch.randn(shape, generator=random))
        ((masked * torch.randn(shape, generator=random)).sum() + 0.7 * gate.energy).backward()
        return [masked.detach(), gate.energy.detach(), *(p.grad for p in gate.parameters() if p.grad is not None)]

    cases = [((160, 160), 0), ((257, 516), 1), ((80, 268), 2)]
    found = [run(*cases[0])]
    with torch._dynamo.config.patch(error_on_recompile=True):
        found += [run(*case) for case in cases[1:]]
    monkeypatch.setenv("LEAP_PL_COMPILE", "0")
    for case, results in zip(cases, found, strict=True):
        for compiled, expected in zip(results, run(*case), strict=True):
            torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


class Operations(TorchDispatchMode):
    """Counts operations: on a GPU each would be a launch or more."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("columns", [64, 66])
def test_sums_over_tiles_take_as_many_operations_however_many_tiles_there_are(columns: int) -> None:
    found = {}
    for outputs in (37, 1001):
        grid = tile_gate((outputs, columns), tile=8).grid
        value = torch.randint(-8, 9, (outputs, columns)).float()  # sums are exact in any order
        with Operations() as operations:
            sums = grid.sums(value)
        by_hand = [rows.sum(0).split(8) for rows in value.split(8)]
        assert torch.equal(sums, torch.stack([torch.stack([part.sum() for part in row]) for row in by_hand]))
        found[outputs] = operations.number
    assert found[37] == found[1001]


def test_settings_that_make_no_sense() -> None:
    for wrong in ({"spread": 0.0}, {"pattern_spread": -1.0}, {"strength": -1.0}):
        with pytest.raises(ValueError, match=r"^model\.gate\.(spread|strength|pattern_spread) is .*; give "):
            tile_gate((8, 8), **wrong)
    with pytest.raises(UserError, match=r"model\.gate\.mode is 'tiles'; give tile or joint"):
        tile_gate((8, 8), mode="tiles")
    with pytest.raises(UserError, match="tile 0 is invalid"):
        tile_gate((8, 8), tile=0)
    with pytest.raises(UserError, match="pattern 4:4 is invalid"):
        tile_gate((8, 8), n=4)
    with pytest.raises(UserError, match=r"model.gate.tile is 6, and joint mode needs a multiple of 4"):
        tile_gate((8, 8), tile=6)
    assert tile_gate((8, 8), tile=6, mode="tile").settings()["tile"] == 6
    gate = tile_gate((8, 8))
    assert [Gates.of({"w": gate}).exact_sparsity(s) for s in (0.1, 0.45, 0.5)] == [0.1, 0.45, 0.5]
    thirds = Gates.of({"w": tile_gate((9, 9), n=1, m=3, tile=3)})
    assert thirds.exact_sparsity(0.666667) == 2 / 3  # as the message for more of it advises
    with pytest.raises(UserError, match=r"dense or 2:4 remove 0.5 at most. Set --model.sparsity 0.5 or less"):
        Gates.of({"w": gate}).exact_sparsity(0.6)


# -- the start --------------------------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_tiles_start_from_the_densities_of_the_unstructured_prior(default: torch.dtype) -> None:
    """A tile of density d leans by strength·spread·(2t − 1), t = (d − ½)/½ between 0 and 1 for 2:4."""
    gate = tile_gate((8, 12), spread=1e-6, strength=3.0)
    prior = torch.ones(8, 12, dtype=torch.bool)
    densities = [1.0, 0.75, 0.5, 0.25, 0.0, 0.9375]
    for tile, density in zip(tiles_of(prior, 1, 4), densities, strict=True):
        tile.view(4, 4).fill_(False)
        for k in range(round(16 * density)):
            tile[k // 4, k % 4] = True
    with default_dtype(default):  # which Lightning sets to that of a *-true precision while a module is configured
        gate.start_from(prior, seed=0)
    lean = torch.tensor([3.0, 0.0, -3.0, -3.0, -3.0, 2.25]).view(2, 3)
    without = tile_gate((8, 12), spread=1e-6)
    without.start_from(None, seed=0)
    torch.testing.assert_close((gate.logits - without.logits).detach() / 1e-6, lean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("shape", "dim"), PLACES)
def test_patterns_start_from_the_inner_prior(shape: tuple[int, ...], dim: int) -> None:
    inner = nm_mask(shape, dim)
    for mode in ("tile", "joint"):
        gate = tile_gate(shape, dim=dim, mode=mode, strength=30.0)
        gate.start_from(None, seed=0, inner=inner)
        assert torch.equal(gate.inner_mask(), inner)
        removed = torch.tensor([int((~tile).sum()) for tile in tiles_of(inner, dim, 4)])
        assert torch.equal(gate.removable.flatten(), removed.to(torch.int32))


def test_patterns_lean_by_a_spread_of_their_own() -> None:
    """By strength·pattern_spread·(shared positions − 1) from a 2:4 prior, whatever the spread of the tiles."""
    inner = nm_mask((8, 12), 1)
    gates = [tile_gate((8, 12), strength=2.0, spread=0.5, pattern_spread=0.01) for _ in range(2)]
    for gate, mask in zip(gates, (inner, None), strict=True):
        gate.start_from(None, seed=0, inner=mask)
    kept = inner.view(-1, 4)
    shared = torch.stack([kept[:, list(p)].sum(1) for p in combinations(range(4), 2)])
    lean = (gates[0].pattern_logits - gates[1].pattern_logits).detach().reshape(6, -1)
    torch.testing.assert_close(lean, 2.0 * 0.01 * (shared - 1), rtol=1e-4, atol=1e-6)
    assert torch.equal(gates[0].logits, gates[1].logits)


def test_curves_of_tiles_and_of_their_patterns() -> None:
    """Each at its own scale: tiles above 0, and the patterns' largest softmax at pattern_alpha/τ."""
    state = GateState()
    state.anneal(3.0, 0.5, pattern_alpha=7.0)
    gate = tile_gate((8, 12), state=state)
    gate.logits.data.copy_(torch.tensor([[1.0, -1.0, -2.0], [-0.5, 2.0, -1.0]]))
    gate.pattern_logits.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    curves = Gates.of({"w": gate}).curves(1)
    assert curves["tiles/logits_above_0"] == pytest.approx(2 / 6)
    confident = (gate.pattern_logits.detach().reshape(6, -1) * 7.0 / 0.5).softmax(0).amax(0).mean()
    assert curves["patterns/confidence"] == pytest.approx(float(confident), rel=1e-5)
    some = (gate.pattern_logits.detach().reshape(6, -1)[:, ::5] * 7.0 / 0.5).softmax(0).amax(0).mean()
    assert Gates.of({"w": gate}).curves(5)["patterns/confidence"] == pytest.approx(float(some), rel=1e-5)
    assert Gates.of({"w": gate}).prior_forms(0.3) == {"prior": Unstructured(0.3), "inner": NM(2, 4)}


def test_an_inner_mask_that_is_not_nm_is_refused() -> None:
    gate = tile_gate((8, 8), mode="tile")
    with pytest.raises(UserError, match=r"prior.masks.inner is not 2:4 in w"):
        gate.start_from(None, seed=0, inner=torch.ones(8, 8, dtype=torch.bool))


# -- hard masks -------------------------------------------------------------------------------------------


@st.composite
def several_gates(draw: st.DrawFn) -> dict[str, TileGate]:
    """Gates of one kind on weights of any shapes, with many equal logits."""
    n, m = draw(st.sampled_from([(2, 4), (1, 4), (1, 2), (2, 3)]))
    mode = draw(st.sampled_from(["tile", "joint"]))
    size = m * draw(st.integers(1, 3)) if mode == "joint" else draw(st.integers(1, 9))
    gates = {}
    for i in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(1, 20), min_size=2, max_size=2)))
        if draw(st.booleans()):
            shape = (2, *shape)
        dim = len(shape) - 1 - draw(st.integers(0, 1))
        gate = tile_gate(shape, dim=dim, name=str(i), n=n, m=m, tile=size, mode=mode)
        gate.start_from(None, seed=i, inner=nm_mask(shape, dim, n, m, i))
        values = torch.tensor([-0.2, 0.0, 0.1])
        random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        gate.logits.data.copy_(values[torch.randint(0, 3, gate.logits.shape, generator=random)])
        gates[str(i)] = gate
    return gates


@settings(max_examples=120, deadline=None)
@given(several_gates(), st.floats(0, 1), st.integers(1, 11))
def test_hard_masks_are_of_the_asked_sparsity_to_one_tile(gates: dict[str, TileGate], part: float, stride: int) -> None:
    first = next(iter(gates.values()))
    sparsity = part * first.tiled.nm.sparsity
    Gates.of(gates).choose(sparsity)
    masks = {name: gate.hard_mask() for name, gate in gates.items()}
    inner = {name: gate.inner_mask() for name, gate in gates.items()}
    chosen: list[tuple[float, bool, int]] = []  # of each tile its logit, whether it is dense, what it would lose
    for name, gate in gates.items():
        dim, size = gate.input_dim, gate.tiled.size
        assert follows(masks[name], dim, gate.tiled)
        tiles = zip(
            *(tiles_of(mask, dim, size) for mask in (masks[name], inner[name])),
            gate.logits.detach().flatten(),
            strict=True,
        )
        for tile, low, logit in tiles:
            assert bool(tile.all()) or torch.equal(tile, low)
            chosen.append((float(logit), bool(tile.all()), int((~low).sum())))
    # The dense tiles are the first of a ranking by logit, ties by index.
    losing = [c for c in chosen if c[2]]
    ranked = sorted(range(len(losing)), key=lambda i: (-losing[i][0], i))
    assert all(losing[a][1] >= losing[b][1] for a, b in pairwise(ranked))
    # One tile more or less would be no closer.
    total = sum(mask.numel() for mask in masks.values())
    removed = sum(int((~mask).sum()) for mask in masks.values())
    asked = round(sparsity * total)
    dense = sum(losing[i][1] for i in ranked)
    if dense:
        assert abs(removed - asked) <= abs(removed + losing[ranked[dense - 1]][2] - asked)
    if dense < len(ranked):
        assert abs(removed - asked) <= abs(removed - losing[ranked[dense]][2] - asked)
    samples = Gates.of(gates).sample_hard_masks(sparsity, stride)
    for name, gate in gates.items():
        assert torch.equal(samples[name], masks[name].reshape(-1)[::stride])
        with gate.state.passing("hard"):
            assert torch.equal(gate(torch.full(gate.shape, -2.0)), torch.where(masks[name], -2.0, 0.0))


@pytest.mark.parametrize("rows", [5, 8])
def test_a_tile_larger_than_the_matrix_is_one_tile_and_takes_no_memory(rows: int) -> None:
    mask = nm_mask((rows, 8), 1)
    for size in (8, 9, 10**6):  # the last would be a terabyte
        assert follows(mask, 1, Tiled(NM(2, 4), size))
        assert follows(torch.ones_like(mask), 1, Tiled(NM(2, 4), size))
    broken = mask.clone()
    broken[0, 0] = ~broken[0, 0]
    assert not follows(broken, 1, Tiled(NM(2, 4), 10**6))


def test_what_is_no_tiled_mask_is_found_out() -> None:
    mask = nm_mask((8, 8), 1)
    tiled = Tiled(NM(2, 4), 4)
    assert follows(mask, 1, tiled)
    mask[:4, :4] = True
    assert follows(mask, 1, tiled)
    assert not follows(mask, 1, NM(2, 4))
    assert follows(mask, 1, Unstructured(0.5))
    mask[4] = torch.tensor([True, True, True, False, True, True, False, False])
    assert not follows(mask, 1, tiled)


@pytest.mark.parametrize("mode", ["tile", "joint"])
def test_restored_gates_choose_as_the_gates_did(mode: str) -> None:
    weights = find_weights(tiny_model("mixtral"))
    gates = attach(weights, lambda weight, state: TileGate(weight, state, tile=8, mode=mode), GateState())
    stored = {}
    for name, gate in gates.items():
        gate.start_from(None, seed=0, inner=nm_mask(tuple(gate.shape), gate.input_dim))
        logits, *_ = tensors = gate.stored()
        assert logits == "logits"
        beside = {part: gate.stored()[part].clone() for part in tensors if part != "logits"}
        stored[name] = Stored(gate.stored()["logits"].clone(), tuple(gate.shape), weights[name].input_dim, beside)
    settings = gates.describe()["init_args"]
    restored = restore("TileGate", settings, stored)
    gates.choose(0.3)
    restored.choose(0.3)
    for name, gate in gates.items():
        assert torch.equal(restored[name].hard_mask(), gate.hard_mask())
    lacking = {name: Stored(one.logits, one.shape, one.input_dim) for name, one in stored.items()}
    with pytest.raises(UserError, match=r"stored (inner|pattern_logits) missing; expected shape \("):
        restore("TileGate", settings, lacking)


# -- on a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["tile", "joint"])
def test_on_a_model_every_logit_learns(family: str, mode: Any) -> None:
    model: Any = tiny_model(family).requires_grad_(False)
    make = lambda weight, state: TileGate(weight, state, tile=8, mode=mode)  # noqa: E731
    gates = attach(find_weights(model), make, state_at(100.0, 1.0, seed=3))
    for gate in gates.values():
        gate.start_from(None, seed=0, inner=nm_mask(tuple(gate.shape), gate.input_dim))

    def loss() -> Tensor:
        lm = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        sums = torch.stack([0.01 * gate.kept / gate.shape.numel() - 0.05 * gate.energy for gate in gates.values()])
        return lm + sums.sum()

    before = loss()
    before.backward()
    parameters = [parameter for gate in gates.values() for parameter in gate.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in parameters)
    norm = sum(p.grad.square().sum() for p in parameters)
    step = 0.002 / norm.sqrt()
    with torch.no_grad():
        for parameter in parameters:
            parameter -= step * parameter.grad
        assert 0.5 * step * norm < before - loss() < 1.5 * step * norm


def test_logits_and_buffers_keep_every_bit_when_the_model_is_cast() -> None:
    model = tiny_model().requires_grad_(False)
    gates = attach(find_weights(model), lambda weight, state: TileGate(weight, state, tile=8), GateState())
    for gate in gates.values():
        gate.start_from(None, seed=0)
    before = {name: {k: v.clone() for k, v in gate.stored().items()} for name, gate in gates.items()}
    model.bfloat16()
    for name, gate in gates.items():
        for part, tensor in gate.stored().items():
            assert tensor.dtype == before[name][part].dtype
            assert torch.equal(tensor, before[name][part])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4)])
def test_tiles_at_the_edge_and_other_patterns_start_from_their_own_densities(n: int, m: int) -> None:
    gate, without = (tile_gate((6, 10), n=n, m=m, spread=1e-6, strength=3.0) for _ in range(2))
    prior = torch.rand(6, 10, generator=torch.Generator().manual_seed(0)) < 0.8
    gate.start_from(prior, seed=0)
    without.start_from(None, seed=0)
    densities = torch.tensor([float(tile.float().mean()) for tile in tiles_of(prior, 1, 4)]).view(2, 3)
    share = ((densities - n / m) / (1 - n / m)).clamp(0, 1)
    lean = (gate.logits - without.logits).detach() / 1e-6
    torch.testing.assert_close(lean, 3.0 * (2 * share - 1), rtol=1e-3, atol=1e-3)
