"""Many ranks: what is shared among them, what each holds of a sharded tensor, and what they add up.

Two of Lightning's strategies are used as they are. Under ``DDPStrategy`` every rank holds the whole model and
only logits are reduced. Under ``ModelParallelStrategy`` every decoder block is sharded by
``torch.distributed.fsdp.fully_shard``: of each weight, its logit, the logit's gradient and the optimizer's state
a rank holds one slice along the first dimension, a ``DTensor``; before a block runs, its weights and logits are
gathered whole, so that a gate sees the elements it would see in one process, with the same noise.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from leap_pl.errors import UserError

if TYPE_CHECKING:
    import lightning as L

Made = TypeVar("Made")


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``: a slice along the first dimension, or all of a plain tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def offset_of(tensor: Tensor) -> int:
    """The flat index, in the whole tensor, of the first element of this rank's part."""
    if not isinstance(tensor, DTensor):
        return 0
    assert tuple(tensor.placements) == (Shard(0),), tensor.placements
    # As torch.chunk cuts: equal slices, rounded up, the last ones shorter or empty.
    rows = -(-tensor.shape[0] // tensor.device_mesh.size())
    first = min(rows * tensor.device_mesh.get_local_rank(), tensor.shape[0])
    return first * (tensor.numel() // max(1, tensor.shape[0]))


def as_whole(part: Tensor, like: Tensor) -> Tensor:
    """``part``, computed from this rank's part of ``like``, as a tensor sharded in the same way."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def gathered(tensor: Tensor) -> Tensor:
    """The whole of ``tensor``, on every rank; each of them makes this call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def strided_sample(tensor: Tensor, stride: int) -> Tensor:
    """Every ``stride``-th element of the flattened ``tensor``, whole on every rank."""
    if not isinstance(tensor, DTensor):
        return tensor.reshape(-1)[::stride]
    part = own_part(tensor).reshape(-1)[-offset_of(tensor) % stride :: stride]
    counts = Ranks.of([tensor]).gather([part.numel()])
    padded = torch.cat([part, part.new_zeros(max(counts) - part.numel())])  # to one length, for the collective
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=tensor.device_mesh.get_group())
    return torch.cat([held[:count] for held, count in zip(parts, counts, strict=True)])


@dataclass(frozen=True)
class Ranks:
    """The ranks that share some tensors; one alone for plain tensors.

    Attributes:
        rank: This one, from 0.
        size: How many.
        group: Their process group.
        device: Where the group's backend communicates.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    device: torch.device = torch.device("cpu")

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> "Ranks":
        """Those that ``tensors`` are sharded over."""
        for tensor in tensors:
            if isinstance(tensor, DTensor):
                mesh = tensor.device_mesh
                return cls(mesh.get_local_rank(), mesh.size(), mesh.get_group(), own_part(tensor).device)
        return cls()

    def sum(self, tensor: Tensor) -> Tensor:
        """Element by element, over all ranks, on the CPU."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def any(self, value: bool) -> bool:
        """Whether it holds on any rank."""
        return bool(self._reduced(torch.tensor(int(value)), dist.ReduceOp.MAX))

    def highest(self, numbers: Sequence[int]) -> list[int]:
        """The highest of each number over all ranks."""
        return [int(n) for n in self._reduced(torch.tensor(numbers, dtype=torch.int64), dist.ReduceOp.MAX)]

    def gather(self, numbers: Sequence[int]) -> list[int]:
        """The numbers of all ranks, rank after rank."""
        own = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        if self.size == 1:
            return list(numbers)
        found = own.new_empty(self.size * len(own))
        dist.all_gather_into_tensor(found, own, group=self.group)
        return [int(n) for n in found]

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        if self.size == 1:
            return tensor
        moved = tensor.to(self.device, copy=True)
        dist.all_reduce(moved, how, group=self.group)
        return moved.cpu()


# ---------------------------------------------------------------------------------------------------------
# What a trainer's strategy means here


def data_rank(trainer: "L.Trainer") -> tuple[int, int]:
    """This rank and the number of ranks, each of which has micro-batches of its own."""
    return trainer.global_rank, trainer.world_size


def mean_over_ranks(values: dict[str, float], trainer: "L.Trainer") -> dict[str, float]:
    """The mean of each value over all ranks, every one of which makes this call with the same names."""
    if trainer.world_size == 1:
        return values
    own = torch.tensor(list(values.values()), dtype=torch.float32, device=trainer.strategy.root_device)
    mean = trainer.strategy.reduce(own, reduce_op="mean")
    return dict(zip(values, mean.tolist(), strict=True))


class RankZero:
    """What rank zero alone makes, and the others wait for as long as it takes.

    A prior can take longer than the time after which a collective of the run's own process group is given up, so
    this is a group with a patience of its own, between CPUs. In a run on one rank nothing waits.
    """

    PATIENCE = timedelta(days=2)

    def __init__(self) -> None:
        self.group = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=self.PATIENCE)
        self.alone = self.group is None
        self.here = self.alone or dist.get_rank() == 0

    def make(self, function: Callable[[], Made]) -> Made | None:
        """What ``function`` returns, on rank zero; None on the others, where it is not called.

        Raises:
            UserError: It raised one on rank zero: every rank then ends with the same line.
        """
        made, failure = None, None
        if self.here:
            try:
                made = function()
            except UserError as error:
                failure = str(error)
            except BaseException:
                self.tell("rank 0 failed; its message is above")
                raise
        failure = self.tell(failure)
        if failure is not None:
            raise UserError(failure)
        return made

    def tell(self, value: Any) -> Any:
        """Rank zero's plain ``value``, on every rank."""
        if self.group is None:
            return value
        told = [value]
        dist.broadcast_object_list(told, 0, group=self.group)
        return told[0]

    def share(self, bits: Tensor | None, count: int) -> Tensor:
        """Rank zero's uint8 tensor of ``count`` elements, on every rank."""
        shared = torch.empty(count, dtype=torch.uint8) if bits is None else bits
        dist.broadcast(shared, 0, group=self.group)
        return shared

    def close(self) -> None:
        """Let the group go."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None


def reduce_only(module: nn.Module, names: Collection[str]) -> None:
    """Keep ``DistributedDataParallel`` to these parameters of ``module``.

    Without this it sends rank zero's frozen weights to all others at the start, which have read the same ones
    from the base model's files, and its buffers before each forward pass.
    """
    others = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name not in names]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, others)
