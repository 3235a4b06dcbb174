"""The Triton kernels in Triton's interpreter, bit by bit against the eager operations; run by test_gpu.py.

The interpreter truncates float32 to bfloat16, where a GPU rounds: bfloat16 results are compared to one unit in the
last place, all others exactly.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import leap_pl.kernels.gpu as gpu
from leap_pl.errors import warn_once
from leap_pl.gates import attach
from leap_pl.gates.bernoulli import BernoulliGate, mask_backward, mask_forward
from leap_pl.gates.gate import GateState
from leap_pl.kernels import noise
from leap_pl.kernels.gpu import losses, masks, packed
from leap_pl.kernels.gpu import noise as device_noise
from leap_pl.losses import language
from leap_pl.sparse import multiply
from leap_pl.sparse.packed_weight import PackedWeight

settings.register_profile("interpreted", deadline=None, max_examples=12)  # each program of a launch is a loop of Python
settings.load_profile("interpreted")

CPU = torch.device("cpu")
SLOPE, SHARPNESS = 400.0, 2.0


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


@triton.jit
def noise_of(out, rows, columns, key_0, key_1, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row_R1, column_1C = masks._tile(tl.program_id(0), columns, ROWS, COLUMNS)
    bits_RC = device_noise.element_bits(row_R1, column_1C, key_0, key_1)
    place_RC = out + masks._offsets(row_R1, column_1C, columns)
    tl.store(place_RC, device_noise.logistic_in_bits(bits_RC), (row_R1 < rows) & (column_1C < columns))


@given(
    rows=st.integers(1, 40), columns=st.integers(1, 300),
    keys=st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 2), skip=st.integers(0, 3),
)  # fmt: skip
def test_noise_is_bit_for_bit_that_of_the_cpu(rows: int, columns: int, keys: tuple[int, int], skip: int) -> None:
    """Of any size, and written to a view that starts at any element."""
    out = torch.empty(rows * columns + skip)[skip:]
    noise_of[(-(-rows // 8) * -(-columns // 64),)](out, rows, columns, *keys, 8, 64)
    words = (scalar(key, torch.int32) for key in keys)
    bits = noise.element_bits(rows, noise.columns(columns, CPU), *words)
    assert torch.equal(out.view(rows, columns), noise.logistic_in_bits(bits))


@triton.jit
def places(tiles, out, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tile = tl.load(tiles + tl.program_id(0))
    row_R1, column_1C = masks._tile(tile, width, ROWS, COLUMNS)
    flat = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + tl.program_id(0) * ROWS * COLUMNS + flat, masks._offsets(row_R1, column_1C, width))


@given(width=st.integers(1, 60_000), far=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4))
def test_places_beyond_2_to_the_31_elements(width: int, far: list[int]) -> None:
    """The arithmetic of the indices alone, for tiles as far as there can be programs."""
    across = -(-width // 16)
    far = [min(tile, across * (2**31 // 8) - 1) for tile in far]  # rows are 32-bit numbers, as in the noise
    out = torch.empty(len(far), 8, 16, dtype=torch.int64)
    places[(len(far),)](torch.tensor(far, dtype=torch.int32), out, width, 8, 16)
    for tile, found in zip(far, out, strict=True):
        rows, columns = (tile // across) * 8 + torch.arange(8), (tile % across) * 16 + torch.arange(16)
        assert torch.equal(found, rows[:, None] * width + columns)


SHAPES = [(3, 5), (17, 300), (8, 256), (2, 3, 40), (1, 1)]


def tensors(weight: torch.dtype, logit: torch.dtype, *, skip: int = 0) -> dict[str, list[Tensor]]:
    torch.manual_seed(0)

    def some(dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
        flat = [torch.randn(torch.Size(shape).numel() + skip).mul_(scale).to(dtype)[skip:] for shape in SHAPES]
        return [tensor.view(shape) for tensor, shape in zip(flat, SHAPES, strict=True)]

    return {"logits": some(logit, 0.02), "weights": some(weight), "upstream": some(weight)}


KEYS = [key for index in range(len(SHAPES)) for key in noise.noise_keys(0, 1, 2, f"w{index}")]


def arguments(index: int, width: int) -> tuple[Tensor, ...]:
    keys = torch.tensor(KEYS[2 * index : 2 * index + 2], dtype=torch.int32)
    return noise.columns(width, CPU), keys, scalar(SLOPE), scalar(SHARPNESS)


def same(found: Tensor, expected: Tensor) -> bool:
    if found.dtype == torch.bfloat16:
        apart = found.view(torch.int16).int() - expected.view(torch.int16).int()
        return bool((apart.abs() <= 1).all())
    return torch.equal(found, expected)


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("logit", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_masks_and_gradients_are_those_of_the_eager_operations(
    weight: torch.dtype, logit: torch.dtype, skip: int, eager: None
) -> None:
    """Of odd shapes, stacked experts among them, and views that are not aligned."""
    given = tensors(weight, logit, skip=skip)
    masked, sums = masks.mask_forward(given["logits"], given["weights"], KEYS, SLOPE, SHARPNESS)
    grad_sums = torch.randn(2 * len(SHAPES))
    grads = masks.mask_backward(*given.values(), grad_sums, KEYS, SLOPE, SHARPNESS)
    for index, parts in enumerate(zip(*given.values(), strict=True)):
        logit_RC, weight_RC, upstream_RC = (part.reshape(-1, part.shape[-1]) for part in parts)
        more = arguments(index, weight_RC.shape[-1])
        expected, kept, energy = mask_forward(logit_RC, weight_RC, *more)
        assert same(masked[index].view_as(expected), expected)
        torch.testing.assert_close(sums[index], kept, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sums[len(SHAPES) + index], energy, rtol=1e-6, atol=1e-6)
        grad = mask_backward(logit_RC, weight_RC, upstream_RC, grad_sums[index], grad_sums[len(SHAPES) + index], *more)
        assert same(grads[index].view_as(grad), grad)


class Aligned:
    """Stands in for a kernel and holds its argument ALIGNED, which the interpreter takes no notice of."""

    def __init__(self, kernel: Any, found: list[bool]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **settings: Any) -> Any:
            self.found.append(arguments[-1])
            return self.kernel[grid](*arguments, **settings)

        return launch


@pytest.mark.parametrize(("shape", "skip", "aligned"), [((8, 16), 0, True), ((8, 16), 1, False), ((8, 15), 0, False)])
def test_wide_loads_are_of_aligned_rows_alone(
    shape: tuple[int, int], skip: int, aligned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other rows they are an error on a GPU."""
    found: list[bool] = []
    for name in ("_forward", "_backward"):
        monkeypatch.setattr(masks, name, Aligned(getattr(masks, name), found))
    logits, weights, upstream = ([torch.randn(128 + skip)[skip:][: shape[0] * shape[1]].view(shape)] for _ in range(3))
    masks.mask_forward(logits, weights, KEYS[:2], SLOPE, SHARPNESS)
    masks.mask_backward(logits, weights, upstream, torch.randn(2), KEYS[:2], SLOPE, SHARPNESS)
    assert found == [aligned, aligned]


def test_a_sum_of_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one chunk of partial sums, and more than one weight: against float64."""
    monkeypatch.setattr(masks, "ROWS", 1)
    monkeypatch.setattr(masks, "COLUMNS", 16)
    masks.plan_of.cache_clear()
    logits = [torch.randn(30, 150) * 0.02, torch.randn(3, 7) * 0.02]
    weights = [torch.randn_like(logit) for logit in logits]
    masked, sums = masks.mask_forward(logits, weights, KEYS[:4], SLOPE, SHARPNESS)
    masks.plan_of.cache_clear()
    for index, (part, weight) in enumerate(zip(masked, weights, strict=True)):
        torch.testing.assert_close(sums[index].double(), (part.double() / weight.double()).sum(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums[2 + index].double(), part.double().square().sum(), rtol=1e-6, atol=1e-6)


class Launches:
    """Stands in for a kernel and counts its launches."""

    def __init__(self, kernel: Any, made: list[str]) -> None:
        self.kernel, self.made = kernel, made

    def __getitem__(self, grid: Any) -> Any:
        self.made.append(self.kernel.__name__)
        return self.kernel[grid]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators on the CPU; returns the names of the kernels that are launched from now on."""
    made: list[str] = []
    every = (
        (masks, ("_forward", "_backward", "_add")),
        (losses, ("_lm", "_distillation")),
        (packed, ("_multiply", "_unpack")),
    )
    for module, names in every:
        for name in names:
            monkeypatch.setattr(module, name, Launches(getattr(module, name), made))
    monkeypatch.setattr(gpu, "DEVICES", {"cpu"})
    monkeypatch.delenv("LEAP_PL_COMPILE", raising=False)
    assert gpu.has_kernels(CPU)
    made.clear()  # the launch by which that is found out
    return made


for _module, _names in ((masks, ("mask_forward", "mask_backward")), (losses, ("lm_loss", "distillation_loss"))):
    for _name in _names:
        torch.library.impl(f"leap_pl::{_name}", "cpu", getattr(_module, _name))


def learned(model: torch.nn.Module, weights: Any, ids: Tensor, **settings: Any) -> dict[str, Tensor]:
    """The gradients of the logits of one loss of a model with Bernoulli gates."""
    state = GateState(seed=3)
    state.anneal(SLOPE / SHARPNESS, 1 / SHARPNESS)
    gates = attach(weights, BernoulliGate, state)
    for gate in gates.values():
        gate.start_from(None, 0)
    model.train()
    if settings.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model(ids, labels=ids).loss + sum(gates.kept.values()) / gates.numel
    loss.backward()
    return {name: gate.logits.grad for name, gate in gates.items()} | {"loss": loss.detach()}


@pytest.mark.parametrize(("family", "checkpointing"), [("mixtral", False), ("llama", True)])
def test_a_block_is_one_launch_each_way_and_learns_as_on_the_cpu(
    family: str, checkpointing: bool, on_cpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny import tiny_model

    from leap_pl.base_model.weights import find_weights

    found = []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(gpu, "DEVICES", devices)
        monkeypatch.setenv("LEAP_PL_COMPILE", "01"[bool(devices)])
        torch.manual_seed(0)
        model = tiny_model(family)
        ids = torch.randint(0, model.config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(1))
        found.append(learned(model, find_weights(model), ids, checkpointing=checkpointing))
    blocks = model.config.num_hidden_layers
    again = 2 if checkpointing else 1
    assert on_cpu.count("_forward") == on_cpu.count("_add") == blocks * again
    assert on_cpu.count("_backward") == blocks
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [16, 4096])
def test_losses_are_those_of_the_eager_operations(
    dtype: torch.dtype, block: int, on_cpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "BLOCK", block)
    torch.manual_seed(0)
    logits, teacher = (4 * torch.randn(5, 37)).to(dtype), (4 * torch.randn(5, 37)).to(dtype)
    logits[0, 1:20] = -float("inf")  # a whole block of the smaller size: tokens that a model rules out
    teacher[0, 5:10] = -float("inf")  # some of them are ruled out by both
    target, token = torch.tensor([0, 36, 3, 3, 20], dtype=torch.int32), torch.arange(37, dtype=torch.int32)
    close = partial(torch.testing.assert_close, rtol=1e-2 if dtype == torch.bfloat16 else 2e-6, atol=1e-6)
    weights = (scalar(0.3), scalar(0.7), scalar(2.0))
    found = [language._lm_loss(logits, target, token, weights[0])]
    found.append(language._distillation_loss(logits, teacher, target, token, *weights))
    assert on_cpu == ["_lm", "_distillation"]
    monkeypatch.setattr(gpu, "DEVICES", set())
    monkeypatch.setenv("LEAP_PL_COMPILE", "0")
    expected = [language._lm_loss(logits, target, token, weights[0])]
    expected.append(language._distillation_loss(logits, teacher, target, token, *weights))
    for one, other in zip(found, expected, strict=True):
        for part, reference in zip(one, other, strict=True):
            close(part, reference)


def test_operators_know_the_shapes_of_their_results() -> None:
    """As torch.compile and torch.export ask for them."""
    given = tensors(torch.bfloat16, torch.float32)
    sums = torch.randn(2 * len(SHAPES))
    calls = {
        "mask_forward": (given["logits"], given["weights"], KEYS, SLOPE, SHARPNESS),
        "mask_backward": (*given.values(), sums, KEYS, SLOPE, SHARPNESS),
        "lm_loss": (torch.randn(3, 7), torch.tensor([1, 2, 3]), 1.0),
        "distillation_loss": (torch.randn(3, 7), torch.randn(3, 7), torch.tensor([1, 2, 3]), 1.0, 1.0, 2.0),
    }
    for name, inputs in calls.items():
        torch.library.opcheck(
            getattr(torch.ops.leap_pl, name).default, inputs, test_utils=("test_schema", "test_faketensor")
        )


def random_packed(rows: int, columns: int, density: float, dtype: torch.dtype, *, int8: bool = False) -> PackedWeight:
    torch.manual_seed(0)
    mask = torch.rand(rows, columns) < density
    mask[rows // 2] = False  # an empty row
    return PackedWeight.pack(torch.randn(rows, columns).to(dtype), mask, int8=int8)


@pytest.mark.parametrize(("rows", "columns", "density"), [(1, 1, 1), (20, 199, 0.5), (7, 64, 0.1), (3, 33, 0)])
@pytest.mark.parametrize(
    ("dtype", "int8", "count"),
    [
        (torch.bfloat16, False, 1),
        (torch.float32, False, 1),
        (torch.bfloat16, True, 1),
        # In tl.dot, the interpreter takes the bits of bfloat16 for integers.
        (torch.float16, False, 16),
        (torch.float32, False, 3),
        (torch.float16, True, 3),
    ],
    ids=str,
)
def test_packed_products_are_those_in_float64(
    dtype: torch.dtype, int8: bool, count: int, rows: int, columns: int, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of one block of 32 columns each, as a large weight is cut; and in one part, of one block."""
    weight, bias = random_packed(rows, columns, density, dtype, int8=int8), torch.randn(rows).to(dtype)
    x = torch.randn(2 * count, columns).to(dtype)[::2]
    parts = (x, weight.bitmap, weight.values, weight.starts, weight.scale, bias, columns)
    expected = x.double() @ weight.unpack().double().T + bias.double()
    rtol, atol = {torch.bfloat16: (1e-2, 1e-2), torch.float16: (1e-3, 1e-2), torch.float32: (1e-5, 1e-5)}[dtype]
    monkeypatch.setattr(packed, "WORDS", 2)
    for block in (32, 512):
        monkeypatch.setattr(packed, "COLUMNS", block)
        found = packed.linear(*parts)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("int8", [False, True])
def test_a_packed_weight_is_unpacked_bit_for_bit(dtype: torch.dtype, int8: bool) -> None:
    for rows, columns, density in ((7, 1100, 0.5), (9, 33, 0.1), (1, 1, 1)):
        weight = random_packed(rows, columns, density, dtype, int8=int8)
        parts = (weight.bitmap, weight.values, weight.starts, weight.scale, columns, dtype)
        assert torch.equal(packed.unpack(*parts), weight.unpack(dtype))


def test_few_rows_are_multiplied_packed_and_many_unpacked(on_cpu: list[str]) -> None:
    weight = random_packed(8, 40, 0.5, torch.float32)
    for count, kernel in ((16, "_multiply"), (17, "_unpack")):
        x = torch.randn(count, 40)
        found = multiply._linear(x, weight.bitmap, weight.values, weight.starts, None, None, 40)
        torch.testing.assert_close(found, x @ weight.unpack().T)
        assert on_cpu.pop() == kernel
    assert not on_cpu


def test_kernels_that_compute_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICES", {"cpu"})
    monkeypatch.delenv("LEAP_PL_COMPILE", raising=False)
    gpu._works.cache_clear()
    warn_once.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "math", SimpleNamespace(log=lambda number: 5.0))
        with pytest.warns(
            UserWarning, match=r"a loss of 5\.0000 is 0\.6931\), so gates and losses run on the GPU without"
        ):
            assert not gpu.has_kernels(CPU)
    gpu._works.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.leap_pl, "mask_backward", lambda gates, *_: [gate * 0 + 7 for gate in gates])
        with pytest.warns(
            UserWarning, match=r"masks of \[1\.0, 0\.0, .* 0\.0\] are \[1\.0, 0\.0, .* 7\.0\]\), so gates"
        ):
            assert not gpu.has_kernels(CPU)
    gpu._works.cache_clear()
    warn_once.cache_clear()
    assert gpu.has_kernels(CPU)
