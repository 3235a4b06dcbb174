"""AdamW with a state of two bytes an element: both moments in 16 bits, with stochastic rounding.

Adam's update is the first moment m over the root of the second, v, and by the Cauchy-Schwarz inequality that ratio
is bounded by the betas alone: |m| ≤ b·√v, b² = (1 − β₁)²/((1 − β₂)(1 − β₁²/β₂)). So the state has, instead of m, the
ratio u = m/√v, on a uniform grid over [−b, b] that does not depend on outliers, and v as a short floating-point
number. Neither needs a scale per block of elements, and every step is one elementwise pass over memory
(:mod:`leap_pl.kernels.packed_adamw`), in place:

=========  ====  ======================================================================================
u = m/√v   7     k·b/63, k = −63 … 63
v          9     2^(e − 54)·(1 + f/8), e = 0 … 63, f = 0 … 7: its root from 7e-9, below Adam's ε, to 31
=========  ====  ======================================================================================

Up to version 0.1.0 the nine bits were those of a logarithm, 2^(k/8 − 54), for which a step computed a logarithm and
three powers. Such a state is converted when it is loaded.

Stored values are rounded stochastically: up or down, with probabilities that make the mean the exact value. Rounding
to nearest would stop v as soon as the change of its average is less than half a step of the grid. bfloat16 parameters
are rounded stochastically for the same reason. The random bits are a hash of (seed, step, parameter, element), like
the gates' noise (:mod:`leap_pl.kernels.noise`): a resumed run rounds exactly like one that was never interrupted, and
checkpoints hold no generator state.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from leap_pl.checkpoints.folder import state_keys
from leap_pl.distributed.shards import Ranks, own_part
from leap_pl.errors import UserError
from leap_pl.inputs.ranges import check_numbers
from leap_pl.kernels.compiled import can_compile, rows, scalar
from leap_pl.kernels.noise import columns, noise_keys
from leap_pl.kernels.packed_adamw import (
    CUT,
    HIGHEST_CODE,
    LOWEST,
    LOWEST_OCTAVE,
    RATIO_BITS,
    as_words,
    packed_step,
    packed_words_step,
    step_numbers,
)
from leap_pl.training.shared_steps import SharedSteps, shared_defaults

MOMENTS, FORMER_MOMENTS = "packed_moments", "moments"  # keys of the state; the latter up to version 0.1.0

# Elements that one call of the kernel updates: on a CPU they fit its caches, elsewhere each call costs launches.
CHUNK, CHUNK_OF_DEVICE = 1 << 18, 1 << 22
# Of words, which need no buffer: eager execution keeps some ten tensors of this size between its operations.
CHUNK_OF_WORDS = 1 << 20
LINE = 1 << 16  # a longer vector is updated as rows of this length, so that it is no single row


class PackedAdamW(torch.optim.Optimizer):
    """AdamW whose state is two bytes for each element of a parameter.

    .. code-block:: yaml

        model:
          logits_dtype: bfloat16
          optimizer:
            class_path: PackedAdamW
            init_args: {lr: 1.0e-3, betas: [0.9, 0.95]}

    Parameters, gradients and state take 6 bytes an element if parameters and gradients are bfloat16, and 10 if they
    are float32; float32 parameters are not rounded. Rounding adds noise to v, which v keeps longer the nearer β₂ is to
    1: some 6% of √v at 0.95.
    """

    # LeapModule requires this of an optimizer of bfloat16 logits, so that small updates are not lost.
    rounds_stochastically: ClassVar[bool] = True

    grad_scale: Tensor | None = None
    """Divisor of all gradients in the next step, as of a fused Adam; :mod:`leap_pl.training.clipping` sets it."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        rows: float = 0.0,
        columns: float = 0.0,
    ) -> None:
        """Initialize the optimizer.

        Args:
            params: Parameters, float32 or bfloat16, or groups of them.
            lr: Learning rate.
            betas: Decay rates of the averages of the gradient and of its square, β₁² < β₂.
            eps: Term added to √v.
            weight_decay: Weight decay; each step subtracts this share, times the learning rate, of a parameter.
            seed: Seed of the rounding.
            rows: Rate of steps that all elements of a row take together, in units of ``lr`` (:class:`SharedAdamW`).
            columns: Likewise for columns.

        Raises:
            UserError: A setting is out of range.
        """
        betas = (float(betas[0]), float(betas[1]))
        if not (0 <= betas[0] < 1 and betas[0] ** 2 < betas[1] < 1):
            raise UserError(
                f"PackedAdamW: betas are {betas[0]:g} and {betas[1]:g}; both must be from 0 to below 1, and the second "
                "above the square of the first. Set model.optimizer.init_args.betas: [0.9, 0.95]."
            )
        if lr < 0 or eps <= 0 or weight_decay < 0:
            raise UserError(
                f"PackedAdamW: lr is {lr}, weight_decay is {weight_decay} and eps is {eps}; give lr and weight_decay "
                "of 0 or more, and eps above 0."
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed}
        check_numbers(defaults, "model.optimizer.", "PackedAdamW: ")
        defaults["differentiable"] = False  # torch adds it on loading; the provenance must not differ after a resume
        super().__init__(params, defaults | shared_defaults("PackedAdamW", rows, columns))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, and return the result of ``closure``."""
        loss = _loss_of(closure)
        place, shared, steps = 0, _Shared(self.grad_scale), SharedSteps(self, self.grad_scale)
        self.grad_scale = None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group, place, shared)
                    steps.take(parameter, group, place)
                place += 1
        return loss

    def _step(self, parameter: Tensor, group: dict[str, Any], place: int, shared: "_Shared") -> None:
        """Update one ``parameter``, which has index ``place`` among all."""
        state = self.state[parameter]
        part, grad = own_part(parameter.detach()), own_part(parameter.grad)  # type: ignore[arg-type]
        if MOMENTS not in state:
            state["step"] = scalar(0.0)
            state[MOMENTS] = _initial_moments(parameter, part)
        state["step"] += 1
        moments, step = own_part(state[MOMENTS]).view(torch.int16).view(part.shape), int(state["step"])
        if not part.numel():  # an empty shard
            return
        # Each shard has its own random numbers; ranks that hold the whole parameter have the same.
        keys = noise_keys(group["seed"], step, Ranks.of([parameter]).rank, f"rounding {place}")
        updated, scalars = part.contiguous(), shared.numbers(step, group)
        for first, tensors in _in_rows(updated, grad.contiguous(), moments):
            words = as_words(*tensors) if updated.dtype == grad.dtype == torch.bfloat16 else None
            height, width = tensors[0].shape
            column_C = columns(LINE if first else width, part.device)
            some = max(_elements_a_call(part, words is not None) // width, 1)
            places = range(0, height, some)
            key_0, key_1, *rows_before = _integers(*keys, *(first + at for at in places))
            for at, row in zip(places, rows_before, strict=True):
                numbers = key_0, key_1, row, shared.share, *scalars
                if words is not None:
                    parameter_RW, grad_RW, moments_RW = (tensor[at : at + some].data for tensor in words)
                    packed_words_step(parameter_RW, grad_RW, moments_RW, column_C[: width // 2].data, *numbers)
                    continue
                parameter_RC, grad_RC, moments_RC = (tensor[at : at + some].data for tensor in tensors)
                code_RC = shared.room_like(moments_RC).copy_(moments_RC)
                packed_step(parameter_RC, grad_RC, code_RC, column_C[:width].data, *numbers)
                moments_RC.copy_(code_RC)
        if updated is not part:
            part.copy_(updated)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, also one of version 0.1.0; torch's own method would convert each code to a number."""
        states = {name: _of_this_version(state) for name, state in state_dict["state"].items()}
        if any(MOMENTS not in state for state in states.values()):
            raise UserError(
                "the checkpoint has the state of another optimizer, not of PackedAdamW. Set model.optimizer and "
                "model.logits_dtype to the values at the start of the run."
            )
        steps = {name: {key: state[key] for key in state.keys() & {"step"}} for name, state in states.items()}
        super().load_state_dict({**state_dict, "state": steps})
        saved = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for name, parameter in zip(saved, parameters, strict=True):
            for key, value in states.get(name, {}).items():
                if key != "step":  # float32 and codes, which stay what they are
                    self.state[parameter][key] = value.to(parameter.device, copy=True)


class SharedAdamW(torch.optim.AdamW):
    """AdamW that also moves all logits of a row, and all of a column, together (:mod:`leap_pl.training.shared_steps`).

    .. code-block:: yaml

        model:
          optimizer:
            class_path: SharedAdamW
            init_args: {lr: 1.0e-3, betas: [0.9, 0.95], rows: 0.5, columns: 0.5}

    The state has one more number for each row and each column. It is for short runs from a graded prior: logits that
    all start equally far from 0 would be flipped in no order (dev/tuning.md).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool = True,
        rows: float = 0.5,
        columns: float = 0.5,
    ) -> None:
        """Initialize the optimizer.

        Args:
            params: Parameters, float32, or groups of them.
            lr: Learning rate.
            betas: Decay rates of the averages of the gradient and of its square, also of the shared ones.
            eps: Term added to the root of the average of the square.
            weight_decay: Weight decay; each step subtracts this share, times the learning rate, of a parameter.
            fused: Whether AdamW updates a parameter in one pass over memory.
            rows: Rate of the steps that all elements of a row take together, in units of ``lr``; 0: none.
            columns: Likewise for columns.

        Raises:
            UserError: ``rows`` or ``columns`` is negative.
        """
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        # After torch has completed the groups, which then get these settings as well.
        shared = shared_defaults("SharedAdamW", rows, columns)
        self.defaults.update(shared)
        for group in self.param_groups:
            for name, rate in shared.items():
                group.setdefault(name, rate)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, and return the result of ``closure``."""
        loss = _loss_of(closure)
        steps = SharedSteps(self, getattr(self, "grad_scale", None))
        super().step()
        infinite = getattr(self, "found_inf", None)  # as the gradient scaler of float16 sets it: the step is skipped
        if infinite is not None and bool(infinite):
            return loss
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                steps.take(parameter, group, place)
                place += 1
        return loss


def _loss_of(closure: Callable[[], Any] | None) -> Any:
    """Return the result of the function that a step may be given, which computes loss and gradients."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _elements_a_call(part: Tensor, words: bool) -> int:
    """Return how many elements of ``part`` one call of the kernel updates."""
    if part.device.type == "cpu":
        return CHUNK_OF_WORDS if words else CHUNK
    # As one kernel, words need no buffer: a call for each part would cost more time than its arithmetic.
    return part.numel() if words and can_compile(part.device) else CHUNK_OF_DEVICE


class _Shared:
    """Arguments of the kernel that its calls in one optimizer step share.

    Attributes:
        share: Factor of all gradients, by which they are clipped.
    """

    def __init__(self, grad_scale: Tensor | None) -> None:
        self.share = scalar(1.0) if grad_scale is None else 1 / grad_scale
        self._codes = torch.empty(0, dtype=torch.int32, device="cpu")
        self._numbers: dict[tuple[int, int], list[Tensor]] = {}

    def numbers(self, step: int, group: dict[str, Any]) -> list[Tensor]:
        """Return the scalars of :func:`step_numbers` for a group of parameters."""
        key = step, id(group)
        if key not in self._numbers:
            rate, (beta_1, beta_2) = float(group["lr"]), group["betas"]
            numbers = step_numbers(step, rate, beta_1, beta_2, group["eps"], group["weight_decay"])
            self._numbers[key] = [scalar(number) for number in numbers]
        return self._numbers[key]

    def room_like(self, moments_RC: Tensor) -> Tensor:
        """Return an int32 tensor of the shape and device of ``moments_RC``, in memory that all calls use."""
        count, device = moments_RC.numel(), moments_RC.device
        if count > self._codes.numel() or device != self._codes.device:
            self._codes = torch.empty(count, dtype=torch.int32, device=device)
        return self._codes[:count].view(moments_RC.shape).data


def _integers(*numbers: int) -> tuple[Tensor, ...]:
    """Return int32 scalar tensors on the CPU."""
    return torch.tensor(numbers, dtype=torch.int32, device="cpu").unbind()


def _of_this_version(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a parameter with v as it is stored now: the nearest of its levels."""
    if FORMER_MOMENTS not in state:
        return state
    former = state[FORMER_MOMENTS].view(torch.int16).to(torch.int32)
    levels = 2 ** (torch.arange(HIGHEST_CODE + 1, device=former.device) / 8 + LOWEST_OCTAVE)
    nearest = ((levels.view(torch.int32) - LOWEST + (1 << (CUT - 1))) >> CUT).clamp(max=HIGHEST_CODE)
    v, u = nearest[(former >> RATIO_BITS) & HIGHEST_CODE], former & (2**RATIO_BITS - 1)
    moments = ((v << RATIO_BITS) | u).to(torch.int16).view(torch.uint8)
    return {name: value for name, value in state.items() if name != FORMER_MOMENTS} | {MOMENTS: moments}


def check_state(checkpoint: Mapping[str, Any], path: str | Path, strategy: object) -> None:
    """Check that the optimizer states of ``checkpoint`` can be loaded by a run with ``strategy``.

    Raises:
        UserError: They are of PackedAdamW of version 0.1.0, and the strategy shards, whose loader asks for each part of
            a state by its name; or they are empty, which that loader cannot read from a file.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    optimizers = checkpoint.get("optimizer_states", [])
    if not Path(path).is_dir() and not all(optimizer["state"] for optimizer in optimizers):
        raise UserError(
            f"{path} has no states of its optimizer, as of SGD without momentum or before the first step, and "
            "Lightning cannot shard such a file. Resume it without ModelParallelStrategy, or start again."
        )
    keys = {key for optimizer in optimizers for state in optimizer["state"].values() for key in state}
    if FORMER_MOMENTS in (state_keys(path) if Path(path).is_dir() else keys):
        raise UserError(
            f"{path} has moments of PackedAdamW as leap_pl 0.1.0 packed them, which a sharded run cannot convert. "
            "Resume it with leap_pl 0.1.0, or without ModelParallelStrategy."
        )


def check_settings(optimizer: torch.optim.Optimizer) -> None:
    """Check that the effective settings of ``optimizer`` are in range, wherever they come from.

    Raises:
        UserError: A learning rate is negative or above 10, a beta is 1 or more, or another setting is out of range.
    """
    for group in optimizer.param_groups:
        plain = {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
        numbers = {name: float(value) if isinstance(value, Tensor) else value for name, value in plain.items()}
        check_numbers(numbers, "model.optimizer.")


def check_rounding(optimizer: torch.optim.Optimizer, logits_dtype: torch.dtype) -> None:
    """Check that ``optimizer`` does not lose small updates of logits in ``logits_dtype``.

    Raises:
        UserError: The logits are bfloat16, and the optimizer would round them to nearest.
    """
    if logits_dtype == torch.float32 or getattr(optimizer, "rounds_stochastically", False):
        return
    raise UserError(
        f"model.logits_dtype is bfloat16 and {type(optimizer).__name__} rounds to nearest: small updates would be "
        "lost, and learning would stop unnoticed. Set --model.optimizer PackedAdamW, or --model.logits_dtype float32."
    )


def _in_rows(*tensors: Tensor) -> list[tuple[int, tuple[Tensor, ...]]]:
    """Return ``tensors`` of equal shape in two dimensions, with the number of their first row: in parts if necessary.

    A long vector is rows of :data:`LINE` elements, and a shorter last one.
    """
    count = tensors[0].numel()
    if tensors[0].ndim != 1 or count <= LINE:
        return [(0, tuple(map(rows, tensors)))]
    whole = count // LINE
    parts = [(0, tuple(tensor[: whole * LINE].view(whole, LINE) for tensor in tensors))]
    if count % LINE:
        parts.append((whole, tuple(tensor[whole * LINE :].view(1, -1) for tensor in tensors)))
    return parts


def _initial_moments(parameter: Tensor, part: Tensor) -> Tensor:
    """Return the initial moments of this rank's ``part`` of a parameter, as bytes, sharded like the parameter.

    They are (…, 2·C) of a matrix, and (C, 2) of a vector: ranks divide the first dimension, and a vector of 2·C bytes
    would be cut elsewhere than its parameter. The dtype is uint8, since no process group supports 16-bit integers.
    """
    zeros = torch.zeros(_bytes_shape(part.shape), dtype=torch.uint8, device=part.device)
    if not isinstance(parameter, DTensor):
        return zeros
    whole = torch.empty(_bytes_shape(parameter.shape), device="meta")
    return DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _bytes_shape(shape: torch.Size) -> tuple[int, ...]:
    """Return the shape of the bytes of 16-bit numbers of ``shape``."""
    return (*shape, 2) if len(shape) == 1 else (*shape[:-1], 2 * shape[-1])
