"""Steps that all logits of a row, or of a column, take together, beside the step that each takes by itself.

A logit θ_ij is seen as e_ij + r_i + c_j, and Adam is applied to each of the three: the gradient of r_i is the sum of
the gradients of row i, that of c_j the sum over column j. As all three are only ever added up, r and c need no place of
their own: a step adds their updates to every logit of the row and of the column.

The gradient of one logit is mostly noise, which a sum over a row averages out. So a row whose weights are worth more
than others' gets denser within a few steps, for which its logits, one by one, would need hundreds: learning moves the
sparsity between the rows and columns of a matrix, which it otherwise leaves as the prior had it (dev/tuning.md).

Sums are divided by the root of the running mean of their squares over the whole parameter, and not, as in Adam, each by
its own: rows with a small gradient then move little.

Shapes: a row is along the last dimension of a parameter, a column along the last but one. Suffixes: R, C = rows and
columns of a matrix, 1 = a kept dimension of size 1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from leap_pl.distributed.shards import Ranks, gathered, own_part
from leap_pl.errors import UserError
from leap_pl.kernels.compiled import can_compile
from leap_pl.kernels.noise import columns, noise_keys
from leap_pl.kernels.offsets import add_rounded

DIMENSIONS = {"rows": -1, "columns": -2}  # setting → dimension over which gradients are summed
CHUNK = 1 << 20  # elements that one call of the kernel of bfloat16 parameters updates


def shared_defaults(name: str, rows: float, columns: float) -> dict[str, float]:
    """Return the settings of an optimizer's groups for steps that are shared; those that are 0 are left out.

    Args:
        name: Name of the optimizer's class, for the message.
        rows: Rate of the steps of rows, in units of the learning rate.
        columns: Likewise for columns.

    Raises:
        UserError: One is negative.
    """
    given = {"rows": float(rows), "columns": float(columns)}
    if min(given.values()) < 0:
        raise UserError(f"{name}: rows is {rows} and columns is {columns}; give 0 or more.")
    # Zero rates are left out: the provenance of a mask learned without shared steps stays as it was.
    return {kind: rate for kind, rate in given.items() if rate}


class SharedSteps:
    """Shared steps of one optimizer step.

    They are made before the optimizer's own step, which may scale the gradients, and taken after it.
    """

    @torch.no_grad()
    def __init__(self, optimizer: torch.optim.Optimizer, grad_scale: Tensor | None) -> None:
        """Sum the gradients of every parameter whose group has shared steps.

        Args:
            optimizer: Optimizer, whose state holds the averages, and whose groups the settings.
            grad_scale: Divisor of the gradients, by which they are clipped or unscaled; None: 1.
        """
        self.optimizer = optimizer
        self.sums: dict[Tensor, dict[str, Tensor]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"] if any(group.get(kind) for kind in DIMENSIONS) else ():
                if parameter.grad is not None and parameter.ndim > 1:
                    self.sums[parameter] = {
                        kind: _sum(parameter.grad, dim, grad_scale)
                        for kind, dim in DIMENSIONS.items()
                        if group.get(kind)
                    }

    @torch.no_grad()
    def take(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        """Update ``parameter``, with index ``place`` among all, by the shared steps that its ``group`` asks for."""
        if parameter not in self.sums:
            return
        state, (beta_1, beta_2) = self.optimizer.state[parameter], group["betas"]
        step, moves = state["step"], {}  # a tensor, perhaps on the device: no host sync
        for kind, summed in self.sums[parameter].items():
            square = gathered(summed.square().sum()) / summed.numel()
            mean = state.setdefault(f"{kind}_mean", torch.zeros_like(summed))
            squares = state.setdefault(f"{kind}_square", torch.zeros_like(square))
            mean.lerp_(summed, 1 - beta_1)
            squares.lerp_(square, 1 - beta_2)
            size = (squares / (1 - beta_2**step)).sqrt() + group["eps"]
            moves[kind] = mean * (-group["lr"] * group[kind] / (1 - beta_1**step)) / size
        self._add(parameter, moves, group, place)

    def _add(self, parameter: Tensor, moves: dict[str, Tensor], group: dict[str, Any], place: int) -> None:
        part, own = own_part(parameter.detach()), {kind: own_part(move) for kind, move in moves.items()}
        if not part.numel():  # an empty shard
            return
        if part.dtype != torch.bfloat16:
            for move in own.values():
                part.add_(move)
            return
        height, width = part.shape[-2:]
        step, rank = int(self.optimizer.state[parameter]["step"]), Ranks.of([parameter]).rank
        # Each shard has its own random numbers; ranks that hold the whole parameter have the same.
        keys = noise_keys(group["seed"], step, rank, f"rounding of shared steps {place}")
        nothing = torch.zeros(1, 1, dtype=torch.float32, device=part.device)
        some = max(CHUNK // width, 1)
        if part.device.type != "cpu" and can_compile(part.device):
            some = height  # one kernel, which needs no buffer
        column_C = columns(width, part.device)
        for matrix, matrix_RC in enumerate(part.view(-1, height, width).unbind()):
            row_R1, offset_1C = (
                own[kind].reshape(-1, *own[kind].shape[-2:])[matrix] if kind in own else nothing for kind in DIMENSIONS
            )
            row_R1, offset_1C = row_R1.expand(height, 1), offset_1C.expand(1, width)
            for at in range(0, height, some):
                numbers = torch.tensor([*keys, matrix * height + at], dtype=torch.int32, device="cpu").unbind()
                # Not views: the shape of a view's base would be compiled in.
                tensors = matrix_RC[at : at + some].data, row_R1[at : at + some].data, offset_1C.data, column_C.data
                add_rounded(*tensors, *numbers)


def _sum(grad: Tensor, dim: int, grad_scale: Tensor | None) -> Tensor:
    """Return the sums of a gradient over ``dim``, float32, sharded like the gradient or whole on every rank."""
    summed = grad.sum(dim, keepdim=True, dtype=torch.float32)
    if isinstance(summed, DTensor) and any(placement.is_partial() for placement in summed.placements):
        summed = summed.full_tensor()
    return summed if grad_scale is None else summed / grad_scale.to(summed.device)
