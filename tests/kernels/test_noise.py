"""The gates' noise: its distribution, its independence in every direction, and that it never changes silently."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from leap_pl.kernels.noise import LONGEST_CACHED, columns, element_bits, gumbel, logistic, noise_keys

ROWS, COLUMNS = 250, 800
SAMPLES = ROWS * COLUMNS
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


def bits_of(place: tuple[int, int, int, str], rows: int = ROWS, length: int = COLUMNS) -> Tensor:
    """Of the first rows and columns of the weight, one row after the other."""
    keys = [torch.tensor(key, dtype=torch.int32) for key in noise_keys(*place)]
    return element_bits(rows, columns(length, torch.device("cpu")), *keys).flatten()


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
    """The extremes: both tails end at log 2²⁴, and are mirror images."""
    edge = torch.tensor([0, 1, 2**31 - 1, -1, -(2**31) + 1, -(2**31)], dtype=torch.int32)
    random = torch.randint(-(2**31) + 1, 2**31, (20_000,), generator=torch.Generator().manual_seed(0)).int()
    bits = torch.cat([edge, random])
    g = logistic(bits)
    v = bits.double() * 2.0**-31
    expected = 2 * torch.atanh(v * (1 - 2.0**-23))
    assert g.dtype == torch.float32
    assert g.isfinite().all()
    # A float32 holds 24 bits of v, so that far out in the tail g is as coarse as 1 − v is.
    coarse = 2.0**-23 / (1 - v.abs() * (1 - 2.0**-23))
    assert ((g.double() - expected).abs() < 4e-7 + 1.1 * coarse).all()
    assert math.isclose(g.max().item(), math.log(2**24 - 1), rel_tol=1e-6)
    torch.testing.assert_close(logistic(-random), -g[len(edge) :], rtol=1e-6, atol=4e-7)


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
    """The means of rows (or columns) scatter as means of independent numbers do."""
    grid = noise[place].reshape(ROWS, COLUMNS)
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
    column = columns(COLUMNS, torch.device("cpu"))
    before = logistic(element_bits(ROWS, column, *keys)).double().numpy().ravel()
    keys[which] = torch.tensor(noise_keys(*PLACES["late"])[which], dtype=torch.int32)
    after = logistic(element_bits(ROWS, column, *keys)).double().numpy().ravel()
    assert abs(np.corrcoef(before, after)[0, 1]) < 4.5 / math.sqrt(SAMPLES)


# -- that it stays what it is -----------------------------------------------------------------------------


def test_an_element_depends_on_its_row_and_column_alone() -> None:
    """A rank that holds some rows of the tensor, or some columns, makes that part of the noise."""
    whole = bits_of(PLACES["base"], 50, 100).view(50, 100)
    assert torch.equal(bits_of(PLACES["base"], 7, 100).view(7, 100), whole[:7])
    assert torch.equal(bits_of(PLACES["base"], 50, 31).view(50, 31), whole[:, :31])
    keys = [torch.tensor(key, dtype=torch.int32) for key in noise_keys(*PLACES["base"])]
    some = torch.tensor([3, 99, 42], dtype=torch.int32)
    assert torch.equal(element_bits(50, some, *keys), whole[:, some.long()])


def test_no_two_rows_are_permuted_copies() -> None:
    """Rows of one tensor share 32-bit values as seldom as chance has it."""
    rows = bits_of(PLACES["base"], 2000, 500).view(2000, 500)
    assert rows.unique().numel() > 10**6 - 200  # 10¹² / 2³³ = 116 pairs expected; a copied row shares 500


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
            [-1134310906, -2005521705, -489482522, -253258882, 916701590, -610946152],
            [-1.1753035, -3.3760264, -0.46401629, -0.23696837, 0.91213173, -0.58513004],
        ),
        (
            (7, 1999, 3, "x"),
            (-245535471, -369204074),
            [533106148, 1643197770, 728619718, 1260816130, -176381740, 1989410182],
            [0.50708735, 2.0171573, 0.7065798, 1.3464986, -0.16463915, 3.2646389],
        ),
    ],
)
def test_golden_values(
    place: tuple[int, int, int, str], keys: tuple[int, int], bits: list[int], values: list[float]
) -> None:
    """A run resumed with another version of this code goes on with the noise it began with."""
    assert noise_keys(*place) == keys
    column = torch.tensor([0, 1, 2, 575, 576, 2**31 - 1], dtype=torch.int32)
    found = element_bits(3, column, *(torch.tensor(key, dtype=torch.int32) for key in keys))[2]
    assert found.dtype == torch.int32
    assert found.tolist() == bits
    torch.testing.assert_close(logistic(found), torch.tensor(values), rtol=1e-6, atol=1e-6)


# -- Gumbel -----------------------------------------------------------------------------------------------


def test_gumbel_noise_has_the_gumbel_distribution(bits: dict[str, Tensor]) -> None:
    drawn = gumbel(torch.cat(list(bits.values()))).double().numpy()
    assert stats.kstest(drawn, stats.gumbel_r.cdf).pvalue > 1e-3
    for quantile in (1e-4, 1e-3, 0.5, 0.999, 0.9999):
        share = (drawn < stats.gumbel_r.ppf(quantile)).mean()
        assert abs(share - quantile) < 5 * (quantile * (1 - quantile) / len(drawn)) ** 0.5


def test_gumbel_noise_is_finite_at_every_end() -> None:
    """At the bits that give the extremes, and next to them; it grows with the bits."""
    ends = torch.tensor([-(2**31), -(2**31) + 1, -(2**31) + 255, -1, 0, 1, 2**31 - 256, 2**31 - 1], dtype=torch.int32)
    noise = gumbel(ends)
    assert noise.isfinite().all()
    assert (noise.diff() >= 0).all()
    expected = torch.tensor([2.0**-24, 1 - 2.0**-24], dtype=torch.float64).log().neg().log().neg()
    torch.testing.assert_close(noise[[0, -1]].double(), expected, rtol=1e-5, atol=1e-5)


def test_only_long_vectors_of_columns_on_a_gpu_are_not_held() -> None:
    """Of stacked experts one is hundreds of megabytes, and no cache of a GPU is emptied of it."""
    gpu, cpu = torch.device("meta"), torch.device("cpu")
    for length, device, held in ((LONGEST_CACHED, gpu, True), (LONGEST_CACHED + 1, gpu, False), (9, cpu, True)):
        assert (columns(length, device) is columns(length, device)) == held
        assert columns(length, device).shape == (length,)
    assert columns(LONGEST_CACHED + 1, cpu) is columns(LONGEST_CACHED + 1, cpu)
    assert columns(9, cpu).tolist() == list(range(9))
