"""AdamW in two bytes a parameter: both moments of one element in 16 bits, parameters rounded at random.

Adam's update is the first moment m over the root of the second, v, and by the Cauchy-Schwarz inequality that ratio
is bounded by the betas alone: |m| ≤ b·√v, b² = (1 − β₁)²/((1 − β₂)(1 − β₁²/β₂)). So instead of m its ratio u = m/√v
is kept, on an even grid over [−b, b] that no outlier can stretch, and v as its logarithm. Neither needs a scale of a
block of neighbours, and every step is one pass over memory that looks at one element at a time:

=========  ====  ======================================================================================
u = m/√v   7     k·b/63, k = −63 … 63
v          9     2^(k/8 − 54), k = 0 … 511: its root from 7e-9, below Adam's ε, to 31
=========  ====  ======================================================================================

What is stored is rounded up or down at random, in proportion to what lies nearer, so that its mean is the exact
value: rounding to the nearest would hold v where it is as soon as a step of its average is less than half a step of
the grid. The same holds for the parameters if they are bfloat16. The bits of chance are a hash of (seed, step,
parameter, element), as the gates' noise is (:mod:`leap_pl.kernels.noise`): a resumed run rounds as the one that was
never stopped, and no state of a generator is saved.
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
RATIO_STEPS = 63  # of u, on each side of 0
OCTAVE_STEPS = 8  # of v
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

    With bfloat16 parameters and gradients that is 6 bytes an element in all. Parameters may be float32 too (10
    bytes); those are not rounded. Rounding v adds noise to it, and the nearer β₂ is to 1 the longer v keeps it: some
    6% of √v at 0.95.
    """

    # What LeapModule asks of an optimizer of bfloat16 logits: that no update is lost, however small.
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
        """Take the settings.

        Args:
            params: Parameters, float32 or bfloat16, or groups of them.
            lr: Learning rate.
            betas: Of the averages of the gradient and of its square, β₁² < β₂.
            eps: Added to √v.
            weight_decay: Share of a parameter that is taken off at each step, times the learning rate.
            seed: Of the rounding.

        Raises:
            UserError: The betas are out of range.
        """
        betas = (float(betas[0]), float(betas[1]))
        if not (0 <= betas[0] < 1 and betas[0] ** 2 < betas[1] < 1):
            raise UserError(
                f"PackedAdamW has betas {betas[0]:g} and {betas[1]:g}; both are below 1, and the second is above the "
                "square of the first. Set model.optimizer.init_args.betas: [0.9, 0.95]."
            )
        if lr < 0 or eps <= 0 or weight_decay < 0:
            raise UserError(
                f"PackedAdamW: lr {lr} and weight_decay {weight_decay} are at least 0, and eps {eps} above."
            )
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed}
        check_numbers(numbers, "model.optimizer.", "PackedAdamW: ")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed}
        defaults["differentiable"] = False  # torch adds it when a state is loaded: a mask would tell of the resume
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns what ``closure`` does."""
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
        """Move one ``parameter``, the ``place``-th of all."""
        state = self.state[parameter]
        part, grad = own_part(parameter.detach()), own_part(parameter.grad)  # type: ignore[arg-type]
        if not state:
            state["step"] = scalar(0.0)
            state["moments"] = _no_moments(parameter, part)
        state["step"] += 1
        moments, step = own_part(state["moments"]).view(torch.int16), int(state["step"])
        if not part.numel():  # a shard of none
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
        # Each shard has numbers of its own; ranks that hold the whole parameter have the same.
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
        """Take up a state; torch's own would make bfloat16 numbers of the codes."""
        if any("moments" not in state for state in state_dict["state"].values()):
            raise UserError(
                "the checkpoint holds the state of another optimizer than PackedAdamW. Give the model.optimizer and "
                "model.logits_dtype that the run began with."
            )
        super().load_state_dict(state_dict)
        saved = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for name, parameter in zip(saved, parameters, strict=True):
            if name in state_dict["state"]:
                moments = state_dict["state"][name]["moments"]
                self.state[parameter]["moments"] = moments.to(parameter.device, copy=True)


def check_settings(optimizer: torch.optim.Optimizer) -> None:
    """Make sure that the numbers that ``optimizer`` acts by are some that can be meant, whatever made it.

    Raises:
        UserError: A learning rate is negative or above 10, a beta is 1 or more, or one of the others is out of range.
    """
    for group in optimizer.param_groups:
        plain = {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
        told = {name: float(value) if isinstance(value, Tensor) else value for name, value in plain.items()}
        check_numbers(told, "model.optimizer.")


def check_rounding(optimizer: torch.optim.Optimizer, logits_dtype: torch.dtype) -> None:
    """Make sure that ``optimizer`` loses no update of logits in ``logits_dtype``.

    Raises:
        UserError: They are bfloat16, and it would round them to the nearest.
    """
    if logits_dtype == torch.float32 or getattr(optimizer, "rounds_stochastically", False):
        return
    raise UserError(
        f"model.logits_dtype is bfloat16 and {type(optimizer).__name__} rounds to the nearest: small updates would be "
        "lost, and learning end unnoticed. Set --model.optimizer PackedAdamW, or --model.logits_dtype float32."
    )


def ratio_bound(beta_1: float, beta_2: float) -> float:
    """b: the largest |m|/√v that any sequence of gradients leads to."""
    return (1 - beta_1) / math.sqrt((1 - beta_2) * (1 - beta_1**2 / beta_2))


def unpack(moments: Tensor, ratio_step: Tensor) -> tuple[Tensor, Tensor]:
    """M and v, float32, from int16 ``moments``; ``ratio_step`` is the step of u's grid, b/63."""
    code = moments.to(torch.int32)
    v = _level(code >> RATIO_BITS)
    u = ((code & (2**RATIO_BITS - 1)) ^ 64) - 64  # seven bits with a sign
    return u.to(torch.float32) * ratio_step * torch.sqrt(v), v


def pack(m: Tensor, v: Tensor, bits: Tensor, ratio_step: Tensor) -> Tensor:
    """The int16 code of the float32 moments ``m`` and ``v``, rounded by the upper two bytes of the int32 ``bits``."""
    place = ((torch.log2(v) - LOWEST_OCTAVE) * OCTAVE_STEPS).clamp(0, HIGHEST_CODE)
    below = torch.floor(place)
    # How far v lies between two levels, which are even in its logarithm and not in v.
    share = (torch.exp2((place - below) * (1 / OCTAVE_STEPS)) - 1) * (1 / (2 ** (1 / OCTAVE_STEPS) - 1))
    code = (below.to(torch.int32) + (_chance(bits >> 16) < share).to(torch.int32)).clamp(max=HIGHEST_CODE)
    # Over the v that is kept, and not the exact one: m is then what comes back.
    u = m / (ratio_step * torch.sqrt(_level(code)))
    u = torch.floor(u + _chance(bits >> 24)).clamp(-RATIO_STEPS, RATIO_STEPS)
    return ((code << RATIO_BITS) | (u.to(torch.int32) & (2**RATIO_BITS - 1))).to(torch.int16)


def _level(code: Tensor) -> Tensor:
    """V from its nine bits; int16 has them at its top, where the first is the sign."""
    return torch.exp2((code & HIGHEST_CODE).to(torch.float32) * (1 / OCTAVE_STEPS) + LOWEST_OCTAVE)


def _chance(bits: Tensor) -> Tensor:
    """The lowest byte as a number from 1/512 to 511/512."""
    return ((bits & 255).to(torch.float32) + 0.5) * (1 / 256)


def round_to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """Float32 ``x`` to one of the two bfloat16 numbers around it, with ``x`` as the mean.

    The lower half of a float32 is what a bfloat16 lacks: a random number is added there, and the half cut off.
    Exact numbers stay.

    Args:
        x: Finite.
        bits: int32 of the same shape, of which the lower two bytes are used.
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
    """The parameter after one step of AdamW, in its own dtype, and its moments.

    Args:
        parameter_RC: float32 or bfloat16.
        grad_RC: Its gradient.
        moments_RC: int16.
        column_C: Numbers of the columns.
        key_0: Of the rounding.
        key_1: Of the rounding.
        rate: Learning rate over 1 − β₁ᵗ.
        unbias: 1/√(1 − β₂ᵗ).
        keep: What weight decay leaves.
        beta_1: Of m.
        beta_2: Of v.
        eps: ε.
        ratio_step: The step of u's grid.
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


def _no_moments(parameter: Tensor, part: Tensor) -> Tensor:
    """The state at the start for this rank's ``part`` of a parameter, (…, 2·C) bytes, sharded as the parameter is.

    Bytes, for no process group sends 16-bit integers.
    """
    zeros = torch.zeros(*part.shape[:-1], 2 * part.shape[-1], dtype=torch.uint8, device=part.device)
    if not isinstance(parameter, DTensor):
        return zeros
    whole = torch.empty(*parameter.shape[:-1], 2 * parameter.shape[-1], device="meta")
    return DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
