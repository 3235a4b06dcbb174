"""The gates' noise: its distribution, its independence in every direction, and that it never changes silently."""

import math
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from leap_pl.gates.noise import hash_bits, logistic, noise_keys

SAMPLES = 200_000
PLACES = {
    "base": (0, 0, 0, "model.layers.0.mlp.up_proj.weight"),
    "tensor": (0, 0, 0, "model.layers.1.mlp.up_proj.weight"),
    "tensor of the same block": (0, 0, 0, "model.layers.0.mlp.gate_proj.weight"),
    "step": (0, 1, 0, "model.layers.0.mlp.up_proj.weight"),
    "micro-batch": (0, 0, 1, "model.layers.0.mlp.up_proj.weight"),
    "seed": (1, 0, 0, "model.layers.0.mlp.up_proj.weight"),
    "swapped step and micro-batch": (1, 0, 1, "model.layers.0.mlp.up_proj.weight"),
    "late": (7, 1999, 31, "model.layers.27.self_attn.o_proj.weight"),
}


def bits_of(place: tuple[int, int, int, str], start: int = 0, stop: int = SAMPLES) -> Tensor:
    keys = [torch.tensor(key, dtype=torch.int32) for key in noise_keys(*place)]
    return hash_bits(torch.arange(start, stop, dtype=torch.int32), *keys)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bits() -> dict[str, Tensor]:
    return {name: bits_of(place) for name, place in PLACES.items()}


@pytest.fixture(scope="module")
def noise(bits: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: logistic(b).double().numpy() for name, b in bits.items()}


def dependence(a: np.ndarray, b: np.ndarray) -> float:
    """p-value of a chi-square test over pairs, each side in 16 bins of equal probability."""
    rows, columns = (np.minimum((stats.logistic.cdf(x) * 16).astype(int), 15) for x in (a, b))
    counts = np.bincount(rows * 16 + columns, minlength=256)
    return float(stats.chisquare(counts).pvalue)


# -- its distribution -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_it_is_logistic(noise: dict[str, np.ndarray], place: str) -> None:
    assert stats.kstest(noise[place], stats.logistic.cdf).pvalue > 1e-3


@pytest.mark.parametrize("place", PLACES)
def test_its_tails_are_logistic(noise: dict[str, np.ndarray], place: str) -> None:
    """Of the magnitudes beyond 5 (1.3% of them), and on each side the right number."""
    g, edge = noise[place], 5.0
    tail = np.abs(g)[np.abs(g) > edge]
    share = 1 / (1 + math.exp(edge))
    for side in ((g > edge).sum(), (g < -edge).sum()):
        assert abs(side - SAMPLES * share) < 4.5 * math.sqrt(SAMPLES * share)
    assert stats.kstest(tail, lambda x: 1 - (1 + math.exp(edge)) / (1 + np.exp(x))).pvalue > 1e-3


def test_mean_variance_and_symmetry(noise: dict[str, np.ndarray]) -> None:
    g = np.concatenate(list(noise.values()))
    variance = math.pi**2 / 3
    assert abs(g.mean()) < 4 * math.sqrt(variance / g.size)
    # The fourth moment of the logistic is 4.2 variances squared.
    assert abs(g.var() - variance) < 4 * math.sqrt(3.2 * variance**2 / g.size)
    assert stats.ks_2samp(g[: g.size // 2], -g[g.size // 2 :]).pvalue > 1e-3


def test_every_pattern_of_bits_is_a_finite_number_by_the_closed_form() -> None:
    """The extremes: both tails reach log(2³³ − 1), and are mirror images."""
    edge = torch.tensor([0, 1, 2**31 - 1, -1, -(2**31), -(2**31) + 1], dtype=torch.int32)
    bits = torch.cat(
        [edge, torch.randint(-(2**31), 2**31, (20_000,), generator=torch.Generator().manual_seed(0)).int()]
    )
    g = logistic(bits)
    p = ((bits.long() & 0x7FFFFFFF).double() + 0.5) * 2.0**-32
    expected = torch.where(bits < 0, -1.0, 1.0) * torch.log((1 - p) / p)
    assert g.dtype == torch.float32
    assert g.isfinite().all()
    torch.testing.assert_close(g.double(), expected, rtol=1e-6, atol=3e-7)
    assert math.isclose(g[0].item(), math.log(2**33 - 1), rel_tol=1e-6)
    assert g[0] == -g[4]
    assert torch.equal(logistic(bits ^ -(2**31)), -g)


# -- its independence -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), list(combinations(PLACES, 2)))
def test_streams_are_independent(noise: dict[str, np.ndarray], one: str, other: str) -> None:
    """Across tensors, steps, micro-batches and seeds: no correlation, and no dependence of another kind."""
    a, b = noise[one], noise[other]
    assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / math.sqrt(SAMPLES)
    assert abs(np.corrcoef(np.abs(a), np.abs(b))[0, 1]) < 4.5 / math.sqrt(SAMPLES)
    assert dependence(a, b) > 1e-4


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 16, 64, 128, 576, 1024, 1536, 4096, 65536])
@pytest.mark.parametrize("place", ["base", "late"])
def test_elements_are_independent(noise: dict[str, np.ndarray], place: str, lag: int) -> None:
    a, b = noise[place][:-lag], noise[place][lag:]
    assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / math.sqrt(a.size)
    assert abs(np.corrcoef(np.abs(a), np.abs(b))[0, 1]) < 4.5 / math.sqrt(a.size)
    assert dependence(a, b) > 1e-4


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("place", PLACES)
def test_rows_and_columns_of_a_weight_are_not_favoured(noise: dict[str, np.ndarray], place: str, axis: int) -> None:
    """The means of rows (or columns) of 256 scatter as means of independent numbers do."""
    grid = noise[place][: 256 * 768].reshape(256, 768)
    means = grid.mean(axis)
    statistic = (means**2).sum() / (math.pi**2 / 3 / grid.shape[axis])
    assert 1e-4 < stats.chi2.cdf(statistic, means.size) < 1 - 1e-4


@pytest.mark.parametrize("place", PLACES)
def test_every_bit_is_fair_and_no_two_go_together(bits: dict[str, Tensor], place: str) -> None:
    signs = ((bits[place][:, None] >> torch.arange(32, dtype=torch.int32)) & 1).double().mul(2).sub(1)
    assert signs.mean(0).abs().max() < 5 / math.sqrt(SAMPLES)
    together = signs.T @ signs / SAMPLES - torch.eye(32)
    assert together.abs().max() < 5.5 / math.sqrt(SAMPLES)


@pytest.mark.parametrize(("one", "other"), list(combinations(["base", "tensor", "step", "late"], 2)))
def test_streams_are_no_shifted_copies(bits: dict[str, Tensor], one: str, other: str) -> None:
    """Two streams share 32-bit values as seldom as chance has it, wherever in the stream."""
    assert bits[one].unique().numel() == SAMPLES
    shared = np.intersect1d(bits[one].numpy(), bits[other].numpy()).size
    assert shared < 40  # 200,000² / 2³² = 9.3 expected; a copy shifted by half its length shares 100,000


@pytest.mark.parametrize("which", [0, 1])
def test_one_key_alone_makes_another_stream(which: int) -> None:
    """Both keys enter, each by itself."""
    keys = [torch.tensor(key, dtype=torch.int32) for key in noise_keys(*PLACES["base"])]
    index = torch.arange(SAMPLES, dtype=torch.int32)
    before = logistic(hash_bits(index, *keys)).double().numpy()
    keys[which] = torch.tensor(noise_keys(*PLACES["late"])[which], dtype=torch.int32)
    after = logistic(hash_bits(index, *keys)).double().numpy()
    assert abs(np.corrcoef(before, after)[0, 1]) < 4.5 / math.sqrt(SAMPLES)


# -- that it stays what it is -----------------------------------------------------------------------------


def test_an_element_depends_on_its_flat_index_alone() -> None:
    """A rank that holds a part of the tensor makes that part of the noise."""
    whole = bits_of(PLACES["base"], 0, 5000)
    assert torch.equal(bits_of(PLACES["base"], 1234, 4321), whole[1234:4321])
    assert torch.equal(bits_of(PLACES["base"], 0, 7), whole[:7])
    keys = [torch.tensor(key, dtype=torch.int32) for key in noise_keys(*PLACES["base"])]
    grid = torch.arange(5000, dtype=torch.int32).view(50, 100)
    assert torch.equal(hash_bits(grid, *keys).flatten(), whole)
    assert torch.equal(hash_bits(grid.T, *keys).T.flatten(), whole)


def test_keys_are_32_bit_and_never_the_same() -> None:
    keys = {noise_keys(s, t, m, n) for s in range(4) for t in range(50) for m in range(4) for n in ("a", "b", "a.b")}
    assert len(keys) == 4 * 50 * 4 * 3
    assert all(-(2**31) <= half < 2**31 for pair in keys for half in pair)
    assert min(half for pair in keys for half in pair) < -(2**30)


@pytest.mark.parametrize(
    ("place", "keys", "bits", "values"),
    [
        (
            (0, 0, 0, "model.layers.0.mlp.up_proj.weight"),
            (543412891, 760110095),
            [-1803303479, -1032825926, 2125067034, -560012795, 931536502, -1678181047],
            [-2.4405048, -1.0484312, 0.020877836, -0.53388232, 1.2838814, -2.0982399],
        ),
        (
            (7, 1999, 3, "x"),
            (-245535471, -369204074),
            [1687792860, 1938209718, -1605952697, -837342756, 2032040628, 1052181326],
            [0.43484533, 0.19552204, -1.9360268, -0.82340688, 0.10761858, 1.1255674],
        ),
    ],
)
def test_golden_values(
    place: tuple[int, int, int, str], keys: tuple[int, int], bits: list[int], values: list[float]
) -> None:
    """A run resumed with another version of this code goes on with the noise it began with."""
    assert noise_keys(*place) == keys
    index = torch.tensor([0, 1, 2, 575, 576, 2**31 - 1], dtype=torch.int32)
    found = hash_bits(index, *(torch.tensor(key, dtype=torch.int32) for key in keys))
    assert found.dtype == torch.int32
    assert found.tolist() == bits
    torch.testing.assert_close(logistic(found), torch.tensor(values), rtol=1e-6, atol=1e-6)
