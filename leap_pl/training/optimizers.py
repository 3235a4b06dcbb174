"""AdamW with a state of two bytes an element: both moments in 16 bits, with stochastic rounding.

Adam's update is the first moment m over the root of the second, v, and by the Cauchy-Schwarz inequality that ratio
is bounded by the betas alone: |m| ≤ b·√v, b² = (1 − β₁)²/((1 − β₂)(1 − β₁²/β₂)). So the state has, instead of m, the
ratio u = m/√v, on a uniform grid over [−b, b] that does not depend on outliers, and v as its logarithm. Neither needs
a scale per block of elements, and every step is one elementwise pass over memory:

=========  ====  ======================================================================================
u = m/√v   7     k·b/63, k = −63 … 63
v          9     2^(k/8 − 54), k = 0 … 511: its root from 7e-9, below Adam's ε, to 31
=========  ====  ======================================================================================

Stored values are rounded stochastically: up or down, with probabilities that make the mean the exact value. Rounding
to nearest would stop v as soon as the change of its average is less than half a step of the grid. bfloat16 parameters
are rounded stochastically for the same reason. The random bits are a hash of (seed, step, parameter, element), like
the gates' noise (:mod:`leap_pl.kernels.noise`): a resumed run rounds exactly like one that was never interrupted, and
checkpoints hold no generator state.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from leap_pl.distributed.shards import Ranks, own_part
from leap_pl.errors import UserError
from leap_pl.inputs.ranges import check_numbers
from leap_pl.kernels.compiled import compiled, rows, scalar
from leap_pl.kernels.noise import columns, element_bits, noise_keys

RATIO_BITS = 7
RATIO_STEPS = 63  # steps of u's grid on each side of 0
OCTAVE_STEPS = 8  # steps of v's grid in an octave
LOWEST_OCTAVE = -54  # log2 of the smallest v
HIGHEST_CODE = 511


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

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Initialize the optimizer.

        Args:
            params: Parameters, float32 or bfloat16, or groups of them.
            lr: Learning rate.
            betas: Decay rates of the averages of the gradient and of its square, β₁² < β₂.
            eps: Term added to √v.
            weight_decay: Weight decay; each step subtracts this share, times the learning rate, of a parameter.
            seed: Seed of the rounding.

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
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed}
        check_numbers(numbers, "model.optimizer.", "PackedAdamW: ")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed}
        defaults["differentiable"] = False  # torch adds it on loading; the provenance must not differ after a resume
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, and return the result of ``closure``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group, place)
                place += 1
        return loss

    def _step(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        """Update one ``parameter``, which has index ``place`` among all."""
        state = self.state[parameter]
        part, grad = own_part(parameter.detach()), own_part(parameter.grad)  # type: ignore[arg-type]
        if not state:
            state["step"] = scalar(0.0)
            state["moments"] = _initial_moments(parameter, part)
        state["step"] += 1
        moments, step = own_part(state["moments"]).view(torch.int16), int(state["step"])
        if not part.numel():  # an empty shard
            return
        rate, (beta_1, beta_2) = float(group["lr"]), group["betas"]
        numbers = (
            rate / (1 - beta_1**step),
            1 / math.sqrt(1 - beta_2**step),
            1 - rate * group["weight_decay"],
            beta_1,
            beta_2,
            group["eps"],
            ratio_bound(beta_1, beta_2) / RATIO_STEPS,
        )
        # Each shard has its own random numbers; ranks that hold the whole parameter have the same.
        keys = noise_keys(group["seed"], step, Ranks.of([parameter]).rank, f"rounding {place}")
        moved_RC, moments_RC = packed_step(
            rows(part),
            rows(grad),
            rows(moments),
            columns(rows(part).shape[1], part.device),
            scalar(keys[0], torch.int32),
            scalar(keys[1], torch.int32),
            *(scalar(number) for number in numbers),
        )
        part.copy_(moved_RC.view(part.shape))
        moments.copy_(moments_RC.view(part.shape))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; torch's own method would convert the codes to bfloat16."""
        if any("moments" not in state for state in state_dict["state"].values()):
            raise UserError(
                "the checkpoint has the state of another optimizer, not of PackedAdamW. Set model.optimizer and "
                "model.logits_dtype to the values at the start of the run."
            )
        super().load_state_dict(state_dict)
        saved = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for name, parameter in zip(saved, parameters, strict=True):
            if name in state_dict["state"]:
                moments = state_dict["state"][name]["moments"]
                self.state[parameter]["moments"] = moments.to(parameter.device, copy=True)


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


def ratio_bound(beta_1: float, beta_2: float) -> float:
    """Return b, the largest |m|/√v that any sequence of gradients can lead to."""
    return (1 - beta_1) / math.sqrt((1 - beta_2) * (1 - beta_1**2 / beta_2))


def unpack(moments: Tensor, ratio_step: Tensor) -> tuple[Tensor, Tensor]:
    """Return m and v, float32, from int16 ``moments``; ``ratio_step`` is the step of u's grid, b/63."""
    code = moments.to(torch.int32)
    v = _level(code >> RATIO_BITS)
    u = ((code & (2**RATIO_BITS - 1)) ^ 64) - 64  # seven bits with a sign
    return u.to(torch.float32) * ratio_step * torch.sqrt(v), v


def pack(m: Tensor, v: Tensor, bits: Tensor, ratio_step: Tensor) -> Tensor:
    """Return the int16 code of the float32 moments, rounded by the upper two bytes of the int32 ``bits``."""
    place = ((torch.log2(v) - LOWEST_OCTAVE) * OCTAVE_STEPS).clamp(0, HIGHEST_CODE)
    below = torch.floor(place)
    # Position of v between two levels, in v itself: the levels are uniform in its logarithm.
    share = (torch.exp2((place - below) * (1 / OCTAVE_STEPS)) - 1) * (1 / (2 ** (1 / OCTAVE_STEPS) - 1))
    code = (below.to(torch.int32) + (_uniform(bits >> 16) < share).to(torch.int32)).clamp(max=HIGHEST_CODE)
    # Divide by the root of the stored v, not of the exact one, since unpacking multiplies by it: so m is preserved.
    u = m / (ratio_step * torch.sqrt(_level(code)))
    u = torch.floor(u + _uniform(bits >> 24)).clamp(-RATIO_STEPS, RATIO_STEPS)
    return ((code << RATIO_BITS) | (u.to(torch.int32) & (2**RATIO_BITS - 1))).to(torch.int16)


def _level(code: Tensor) -> Tensor:
    """Return v from its nine bits, the upper ones of an int16, of which the first is the sign bit."""
    return torch.exp2((code & HIGHEST_CODE).to(torch.float32) * (1 / OCTAVE_STEPS) + LOWEST_OCTAVE)


def _uniform(bits: Tensor) -> Tensor:
    """Return the lowest byte as a number from 1/512 to 511/512."""
    return ((bits & 255).to(torch.float32) + 0.5) * (1 / 256)


def round_to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """Round float32 ``x`` stochastically to one of the two bfloat16 numbers around it, with ``x`` as the mean.

    A bfloat16 is the upper half of a float32: a random number is added to the lower half, which is then cut off.
    Numbers that bfloat16 can represent do not change.

    Args:
        x: Finite numbers.
        bits: int32 random bits of the same shape, of which the lower two bytes are used.
    """
    return ((x.view(torch.int32) + (bits & 0xFFFF)) & -0x10000).view(torch.float32).to(torch.bfloat16)


@compiled
def packed_step(
    parameter_RC: Tensor,
    grad_RC: Tensor,
    moments_RC: Tensor,
    column_C: Tensor,
    key_0: Tensor,
    key_1: Tensor,
    rate: Tensor,
    unbias: Tensor,
    keep: Tensor,
    beta_1: Tensor,
    beta_2: Tensor,
    eps: Tensor,
    ratio_step: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the parameter after one step of AdamW, in its own dtype, and its packed moments.

    Args:
        parameter_RC: Parameter, float32 or bfloat16.
        grad_RC: Gradient of the parameter.
        moments_RC: Packed moments, int16.
        column_C: Numbers of the columns.
        key_0: First key of the rounding.
        key_1: Second key of the rounding.
        rate: Learning rate over 1 − β₁ᵗ.
        unbias: Bias correction of √v, 1/√(1 − β₂ᵗ).
        keep: Factor of weight decay.
        beta_1: Decay rate of m.
        beta_2: Decay rate of v.
        eps: Term ε added to √v.
        ratio_step: Step of u's grid.
    """
    bits_RC = element_bits(parameter_RC.shape[0], column_C, key_0, key_1)
    m_RC, v_RC = unpack(moments_RC, ratio_step)
    grad_RC = grad_RC.to(torch.float32)
    m_RC = beta_1 * m_RC + (1 - beta_1) * grad_RC
    v_RC = beta_2 * v_RC + (1 - beta_2) * grad_RC * grad_RC
    moved_RC = keep * parameter_RC.to(torch.float32) - rate * m_RC / (torch.sqrt(v_RC) * unbias + eps)
    if parameter_RC.dtype == torch.bfloat16:
        moved_RC = round_to_bfloat16(moved_RC, bits_RC)
    return moved_RC, pack(m_RC, v_RC, bits_RC, ratio_step)


def _initial_moments(parameter: Tensor, part: Tensor) -> Tensor:
    """Return the initial moments of this rank's ``part`` of a parameter, (…, 2·C) bytes, sharded like the parameter.

    The dtype is uint8, since no process group supports 16-bit integers.
    """
    zeros = torch.zeros(*part.shape[:-1], 2 * part.shape[-1], dtype=torch.uint8, device=part.device)
    if not isinstance(parameter, DTensor):
        return zeros
    whole = torch.empty(*parameter.shape[:-1], 2 * parameter.shape[-1], device="meta")
    return DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
