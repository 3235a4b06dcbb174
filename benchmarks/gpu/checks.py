"""Checks of what a device computes: noise, kernels, losses and whole runs, each with its figure."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from benchmarks import references
from benchmarks.gpu.runs import KINDS, STEPS, WINDOW, Ends, NoSyncs, Place, eager, fit, module_of, process_group
from benchmarks.report import Row, one_line
from leap_pl.base_model.weights import Weight
from leap_pl.gates import BernoulliGate, Gate, GateState, TileGate
from leap_pl.kernels.noise import columns, element_bits, gumbel, logistic, noise_keys
from leap_pl.losses.language import language_losses
from leap_pl.losses.objective import Objective
from leap_pl.sparse.multiply import unpack
from leap_pl.sparse.packed_linear import PackedLinear
from leap_pl.sparse.packed_weight import PackedWeight
from leap_pl.training.optimizers import PackedAdamW

Check = Callable[[], str]  # returns its figure
Figures = dict[str, tuple[float, float]]  # what → its error, and the largest that passes

ANNEALED = [(25.0, 4.0), (100.0, 1.0), (350.0, 0.5)]  # (α, τ)
PLACES = [((64, 96), 1), ((33, 71), 1), ((3, 22, 40), 1), ((40, 18), 0)]  # (shape, dimension of the inputs)
CPU = torch.device("cpu")


class WrongError(Exception):
    """Error of a check that failed; the message is its figure."""


class NotHereError(Exception):
    """Reason why a check cannot be made on this machine."""


def run(checks: Mapping[str, Check], report: Callable[[str], None] = print) -> list[Row]:
    """Make each of ``checks``; return a row for each, whatever becomes of it."""
    rows: list[Row] = []
    for name, check in checks.items():
        start = time.perf_counter()
        try:
            result, figure = "PASS", check()
        except NotHereError as reason:
            result, figure = "skipped", str(reason)
        except WrongError as wrong:
            result, figure = "FAIL", str(wrong)
        except Exception as error:  # whatever it is, the others are made
            result, figure = "FAIL", one_line(error)
        rows.append({"check": name, "result": result, "figure": figure, "seconds": time.perf_counter() - start})
        report(f"{result:7} {name}: {figure}")
    return rows


def checks_of(place: Place, *, large: bool) -> dict[str, Check]:
    """Return the checks of the device of ``place``, by name; ``large`` adds sizes of real weights."""
    found: dict[str, Check] = {
        "random bits: CPU, device and definition": partial(random_bits, place.device, large=large),
        "noise: CPU and device": partial(noise, place.device, large=large),
        "noise: against float64": partial(noise_in_float64, place.device),
    }
    for kind in KINDS:
        found[f"{kind}: forward and backward against float64"] = partial(gate, place.device, kind)
    found["BernoulliGate, bfloat16 logits: against float64"] = partial(
        gate, place.device, "BernoulliGate", logits=torch.bfloat16
    )
    if large:
        found["BernoulliGate, 4096 × 4097: against float64"] = partial(
            gate, place.device, "BernoulliGate", places=[((4096, 4097), 1)]
        )
    found["losses: against float64"] = partial(losses, place.device)
    found["packed weights: against float64, and unpacked"] = partial(packed, place.device)
    for kind in KINDS:
        found[f"fit: {kind}"] = partial(a_fit, place, kind)
    found["resume: bit for bit, math attention"] = partial(resume, place)
    found["resume: bit for bit, low memory"] = partial(
        resume, place, optimizer=partial(PackedAdamW, lr=1e-2), logits_dtype="bfloat16"
    )
    found["DDP of one device"] = partial(one_rank, place, "DDP")
    found["FSDP2 of one device"] = partial(one_rank, place, "FSDP2")
    for kind in KINDS:
        found[f"no host sync in a micro-batch: {kind}"] = partial(no_syncs, place, kind)
    return found


# -- noise ------------------------------------------------------------------------------------------------


def _keys(tensor: str = "w") -> tuple[Tensor, Tensor]:
    first, second = noise_keys(1, 2, 3, tensor)
    return torch.tensor(first, dtype=torch.int32), torch.tensor(second, dtype=torch.int32)


def _bits(device: torch.device, rows: int, length: int) -> Tensor:
    return element_bits(rows, columns(length, device), *_keys())


def random_bits(device: torch.device, *, large: bool) -> str:
    """Check that the bits are the same integers on both devices, and those of their definition."""
    shape = (4096, 4097) if large else (96, 97)
    here, there = _bits(CPU, *shape), _bits(device, *shape).cpu()
    defined = references.random_bits(*shape, *map(int, _keys()))
    return _same({"CPU and definition": (here, defined), "device and CPU": (there, here)})


def noise(device: torch.device, *, large: bool) -> str:
    """Check that logistic and Gumbel noise have the same bits on both devices."""
    shape = (4096, 4097) if large else (96, 97)
    here, there = _bits(CPU, *shape), _bits(device, *shape)
    return _same({kind.__name__: (kind(there).cpu(), kind(here)) for kind in (logistic, gumbel)})


def noise_in_float64(device: torch.device) -> str:
    """Check logistic noise against the logarithm that defines it."""
    bits = _bits(device, 96, 97)
    expected = references.logistic_noise(bits.cpu())
    return _figures({"logistic": (_furthest(logistic(bits), expected, at_least=1.0), 1e-6)})


# -- kernels ----------------------------------------------------------------------------------------------


def gate(
    device: torch.device,
    kind: str,
    *,
    logits: torch.dtype = torch.float32,
    places: list[tuple[tuple[int, ...], int]] = PLACES,
) -> str:
    """Check masked weight, sums and all gradients of a gate against autograd through its formula."""
    make = KINDS[kind].get("gate", BernoulliGate)
    worst: Figures = {}
    cases = product(places, (torch.float32, torch.bfloat16))
    for case, ((shape, dim), dtype) in enumerate(cases):
        alpha, tau = ANNEALED[case % len(ANNEALED)]
        worst = _worst(worst, _gate_case(make, shape, dim, dtype, logits, alpha, tau, device))
    return _figures(worst)


def _gate_case(
    make: Callable[[Weight, GateState], Gate],
    shape: tuple[int, ...],
    dim: int,
    dtype: torch.dtype,
    logits: torch.dtype,
    alpha: float,
    tau: float,
    device: torch.device,
) -> Figures:
    draw = torch.Generator().manual_seed(0)
    weight, upstream = (torch.randn(shape, generator=draw).to(dtype) for _ in range(2))
    module = nn.Module()
    module.weight = nn.Parameter(weight.to(device), requires_grad=False)
    state = GateState(seed=1, step=7, micro_batch=1)
    state.anneal(alpha, tau)
    gate = make(Weight("w", module, "weight", None, "w", dim), state)
    masks = {}
    if isinstance(gate, TileGate):
        masks["inner"] = gate.groups.best(gate.groups.forbid_(torch.rand(gate.groups.logits_shape, generator=draw)))
    gate.start_from(None, 0, **masks)
    gate.store_as(logits)
    masked = gate(module.weight)
    assert gate.kept is not None
    ((masked * upstream.to(device)).sum().float() + 0.2 * gate.kept + 0.3 * gate.energy).backward()

    learned = {name: p.detach().cpu().double().requires_grad_() for name, p in gate.named_parameters()}
    mask = references.soft_mask(gate, learned)
    expected = mask * weight.double()
    ((expected * upstream.double()).sum() + 0.2 * mask.sum() + 0.3 * (expected**2).sum()).backward()
    half = torch.finfo(dtype).eps / 2
    figures = {
        f"W̃ {_short(dtype)}": (_furthest(masked, expected, each=True), max(2 * half, 1e-4)),
        "ΣM": (_furthest(gate.kept, mask.sum()), 1e-5),
        "Σ(MW)²": (_furthest(gate.energy, (expected**2).sum()), 1e-4),
    }
    # The gradient is a difference of the mask's gradients, which are rounded at their own size.
    size = float((upstream.double() * weight.double()).abs().max() + 0.6 * weight.double().square().max())
    for name, theta in learned.items():
        grad = getattr(gate, name).grad
        assert theta.grad is not None
        allowed = 2e-4 + 4e-7 * size * alpha / tau / float(theta.grad.abs().max())
        figures[f"d{name}"] = (_furthest(grad, theta.grad), max(allowed, torch.finfo(logits).eps))
    return figures


def losses(device: torch.device) -> str:
    """Check cross-entropy, divergence and their gradient against autograd through their formulas."""
    draw = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 503, (257,), generator=draw)
    worst: Figures = {}
    for mix in (Objective(chunk=100), Objective(lm=0.4, distillation=0.6, temperature=2.0, chunk=100)):
        for dtype in (torch.float32, torch.bfloat16):
            own, teacher = ((torch.randn(257, 503, generator=draw) * 3).to(dtype) for _ in range(2))
            hidden = own.to(device).requires_grad_()
            distils = mix.distillation > 0
            given = teacher.to(device) if distils else None
            found = language_losses(hidden, targets.to(device), lambda hidden: hidden * 1, mix, given)
            (2.5 * found.weighted).backward()
            z = own.detach().double().requires_grad_()
            ce, kl = references.language_losses(z, targets, teacher.double() if distils else None, mix.temperature)
            (2.5 * (mix.lm * ce + mix.distillation * kl)).backward()
            assert hidden.grad is not None
            assert z.grad is not None
            figures = {"CE": (_furthest(found.lm, ce), 2e-6), "KL": (_furthest(found.distillation, kl), 1e-5)}
            eps = torch.finfo(dtype).eps  # the gradient is rounded twice: as that of the logits, and scaled
            figures[f"dz {_short(dtype)}"] = (_furthest(hidden.grad, z.grad), max(1e-5, eps))
            worst = _worst(worst, figures)
    return _figures(worst)


def packed(device: torch.device) -> str:
    """Check products with packed weights against float64, and that unpacking gives every bit back."""
    draw = torch.Generator().manual_seed(0)
    worst: Figures = {}
    same: dict[str, tuple[Tensor, Tensor]] = {}
    for (shape, _), dtype, count in product(PLACES[:2], (torch.float32, torch.bfloat16), (1, 16, 17)):
        weight, x = torch.randn(shape, generator=draw).to(dtype), torch.randn(count, shape[1], generator=draw).to(dtype)
        kept = torch.rand(shape, generator=draw) < 0.5
        layer = PackedLinear(PackedWeight.pack(weight, kept)).to(device)
        weight.masked_fill_(~kept, 0)
        error = _furthest(layer(x.to(device)), x.double() @ weight.double().T)
        worst = _worst(worst, {f"Wx {_short(dtype)}": (error, max(1e-5, torch.finfo(dtype).eps))})
        parts = (layer.bitmap, layer.values, layer.starts, None, shape[1], dtype)
        same[f"{len(same)}"] = (unpack(*parts).cpu(), weight)
    return f"{_figures(worst)}; {_same(same)}"


# -- runs -------------------------------------------------------------------------------------------------


def a_fit(place: Place, kind: str) -> str:
    """Check that a run learns: finite logits that move, an exact hard mask, the same way as on the CPU."""
    module = module_of(place, **KINDS[kind])
    ends = fit(place, module)
    _learned(ends, place.device)
    module.choose_hard_masks()
    masks = [gate.hard_mask() for gate in module.gates.values()]
    sparsity = 1 - sum(int(mask.sum()) for mask in masks) / module.gates.numel
    figure = f"loss {ends.loss:.4f}, sparsity {sparsity:.4f}"
    allowed = 0.02 if "Tile" in kind else 1e-4  # half a tile
    if not abs(sparsity - module.sparsity) <= allowed:
        raise WrongError(f"{figure}, not {module.sparsity}")
    if place.device.type == "cpu":
        return figure
    with eager():
        there = fit(Place(CPU, place.model, place.text), module_of(place, **KINDS[kind]))
    share = _distance(ends.last, there.last) / _distance(there.last, there.first)
    return f"{figure}; {_figures({'from the run on the CPU, of the way': (share, 0.02)})}"


def resume(place: Place, **settings: Any) -> str:
    """Check that a run that is stopped after half its steps and resumed ends bit-identical."""
    given = {"dtype": "bfloat16", **settings}
    whole = fit(place, module_of(place, **given), math_attention=True)
    _learned(whole, place.device)
    checkpoint = place.model.parent / "stopped.ckpt"
    stop = Ends(STEPS // 2, checkpoint)
    fit(place, module_of(place, **given), ends=stop, math_attention=True)
    if _distance(stop.last, whole.last) == 0:
        raise WrongError("the run was not stopped")
    module = module_of(place, **given)
    resumed = fit(place, module, ckpt_path=checkpoint, math_attention=True)
    note = "" if type(module).__name__ == "LeapModule" else ", its record of settings unread: there is no pydantic"
    return _same({"logits": (_flat(resumed.last), _flat(whole.last))}) + note


def one_rank(place: Place, strategy: str) -> str:
    """Check that a run under a distributed strategy on one device learns the logits of one without."""
    backends = {"cuda": torch.distributed.is_nccl_available, "cpu": torch.distributed.is_gloo_available}
    if not (torch.distributed.is_available() and backends.get(place.device.type, lambda: False)()):
        raise NotHereError(f"torch has no process group for {place.device.type}")
    alone = fit(place, module_of(place, dtype="bfloat16"), math_attention=True)
    made = {
        "DDP": lambda: "ddp",
        "FSDP2": lambda: ModelParallelStrategy(
            data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False
        ),
    }
    with process_group():
        ranks = fit(place, module_of(place, dtype="bfloat16"), math_attention=True, strategy=made[strategy]())
    _learned(ranks, place.device)
    one, other = _flat(ranks.last), _flat(alone.last)
    # FSDP2 adds up the norm of the gradients, by which they are clipped, in another order. A step moves logits by .001.
    furthest = _figures({"logits": (float((one - other).abs().max()), 1e-6)})
    return f"{furthest}, {_differing(one, other)} of {one.numel():,} differ"


def no_syncs(place: Place, kind: str) -> str:
    """Check that no micro-batch has a host sync."""
    if place.device.type == "cpu":
        raise NotHereError("a CPU has no host syncs")
    watch = NoSyncs(place.device)
    _learned(fit(place, module_of(place, **KINDS[kind]), watch), place.device)
    if watch.micro_batches != STEPS * WINDOW:
        raise WrongError(f"{watch.micro_batches} micro-batches, not {STEPS * WINDOW}")
    return f"{watch.micro_batches - 1} micro-batches"


def _learned(ends: Ends, device: torch.device) -> None:
    """Check that a run learned finite logits on its device."""
    if ends.devices != {device.type}:
        raise WrongError(f"logits on {', '.join(sorted(ends.devices))}")
    bad = [name for name, tensor in ends.last.items() if not bool(tensor.isfinite().all())]
    if bad or ends.loss != ends.loss:
        raise WrongError(f"loss {ends.loss}, not finite: {', '.join(bad[:3])}")
    still = [name for name, tensor in ends.last.items() if torch.equal(tensor, ends.first[name])]
    if still:
        raise WrongError(f"not learned: {', '.join(still[:3])}")


# -- figures ----------------------------------------------------------------------------------------------


def _furthest(found: Tensor, expected: Tensor, *, each: bool = False, at_least: float = 0.0) -> float:
    """Return the largest error, relative to the largest value, or to ``each`` value, of at least .01."""
    found, expected = found.detach().cpu().double(), expected.detach()
    if found.shape != expected.shape:
        raise WrongError(f"shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    error = (found - expected).abs()
    size = expected.abs().clamp_min(0.01) if each else expected.abs().max().clamp_min(max(at_least, 1e-30))
    return float((error / size).nan_to_num(float("inf")).max())


def _worst(one: Figures, other: Figures) -> Figures:
    """Return each error that is larger in proportion to what passes."""
    both = [*one.items(), *other.items()]
    return {what: max((f for name, f in both if name == what), key=lambda f: f[0] / f[1]) for what, _ in both}


def _figures(figures: Figures) -> str:
    """Return the errors as text.

    Raises:
        WrongError: One is greater than what passes.
    """
    beyond = {what for what, (error, most) in figures.items() if not error <= most}
    said = [
        f"{what} {error:.1e}{f' > {most:.1e}' if what in beyond else ''}" for what, (error, most) in figures.items()
    ]
    if beyond:
        raise WrongError(", ".join(said))
    return ", ".join(said)


def _same(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """Return the number of elements that were compared and are bit-identical, as text.

    Raises:
        WrongError: Some differ.
    """
    differ = {what: _differing(a, b) for what, (a, b) in pairs.items()}
    if any(differ.values()):
        furthest = max(float((a.double() - b.double()).abs().max()) for a, b in pairs.values())
        said = ", ".join(f"{what}: {count} of {pairs[what][0].numel()} differ" for what, count in differ.items())
        raise WrongError(f"{said}, by {furthest:.1e} at most")
    return f"0 of {sum(a.numel() for a, _ in pairs.values()):,} differ"


def _differing(a: Tensor, b: Tensor) -> int:
    kind = {torch.float32: torch.int32, torch.bfloat16: torch.int16}.get(a.dtype, a.dtype)
    return int((a.view(kind) != b.view(kind)).sum())


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def _distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return float((_flat(one).double() - _flat(other).double()).abs().mean())


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
