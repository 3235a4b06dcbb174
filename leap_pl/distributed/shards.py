"""Sharded tensors: the local part of this rank, and reductions over all ranks.

Under FSDP2 each rank has one slice of every weight and its logits along the first dimension: a ``DTensor`` with the
placement ``Shard(0)``. All functions accept plain tensors as well, whose local part is the whole tensor.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def own_part(tensor: Tensor) -> Tensor:
    """Return the local part of ``tensor``: a slice along the first dimension, or all of a plain tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def offset_of(tensor: Tensor) -> int:
    """Return the flat index, in the whole tensor, of the first element of this rank's part."""
    if not isinstance(tensor, DTensor):
        return 0
    assert tuple(tensor.placements) == (Shard(0),), tensor.placements
    # Same split as torch.chunk: equal slices, rounded up, the last ones shorter or empty.
    rows = -(-tensor.shape[0] // tensor.device_mesh.size())
    first = min(rows * tensor.device_mesh.get_local_rank(), tensor.shape[0])
    return first * (tensor.numel() // max(1, tensor.shape[0]))


def sharded_like(part: Tensor, like: Tensor) -> Tensor:
    """Return ``part``, computed from this rank's part of ``like``, as a tensor sharded like ``like``."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def part_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of ``whole``, a plain tensor of the shape of ``like``, which is sharded."""
    part, start = own_part(like), offset_of(like)
    return whole.reshape(-1)[start : start + part.numel()].view(part.shape)


@torch.no_grad()
def copy_part_(tensor: Tensor, whole: Tensor) -> None:
    """Copy from ``whole``, a plain tensor of the same shape, into this rank's part of ``tensor``."""
    own_part(tensor).copy_(part_like(whole, tensor))


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole ``tensor`` on every rank; a collective that all ranks must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def strided_samples(tensors: Mapping[str, Tensor], stride: int) -> dict[str, Tensor]:
    """Return every ``stride``-th element of each of ``tensors``, flattened and complete on every rank.

    Args:
        tensors: Tensors that are all whole, or all sharded over the same ranks, which must all call this function.
        stride: Distance of the elements in the whole tensor.
    """
    ranks = Ranks.of(tensors.values())
    own = [own_part(tensor).reshape(-1)[-offset_of(tensor) % stride :: stride] for tensor in tensors.values()]
    if ranks.size == 1:
        return dict(zip(tensors, own, strict=True))
    counts = torch.tensor(ranks.gather([part.numel() for part in own]), device="cpu").view(ranks.size, -1).tolist()
    together = torch.cat(own)
    # The collective needs equal lengths.
    padded = torch.cat([together, together.new_zeros(max(map(sum, counts)) - len(together))])
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded, group=ranks.group)
    split = [held[: sum(count)].split(count) for held, count in zip(found, counts, strict=True)]
    return {name: torch.cat([parts[place] for parts in split]) for place, name in enumerate(tensors)}


@dataclass(frozen=True)
class Ranks:
    """Ranks that some tensors are sharded over; a single rank for plain tensors.

    Attributes:
        rank: Index of this rank, from 0.
        size: Number of ranks.
        group: Process group of the ranks.
        device: Device on which the group's backend communicates.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    device: str | torch.device = "cpu"

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> "Ranks":
        """Return the ranks that ``tensors`` are sharded over."""
        for tensor in tensors:
            if isinstance(tensor, DTensor):
                mesh = tensor.device_mesh
                return cls(mesh.get_local_rank(), mesh.size(), mesh.get_group(), own_part(tensor).device)
        return cls()

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the elementwise sum over all ranks, on the CPU."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def any(self, value: bool) -> bool:
        """Return whether ``value`` is true on any rank."""
        return bool(self._reduced(torch.tensor(int(value), device="cpu"), dist.ReduceOp.MAX))

    def highest(self, numbers: Sequence[int]) -> list[int]:
        """Return the maximum of each number over all ranks."""
        return self._reduced(torch.tensor(numbers, dtype=torch.int64, device="cpu"), dist.ReduceOp.MAX).tolist()

    def gather(self, numbers: Sequence[int]) -> list[int]:
        """Return the numbers of all ranks, in the order of ranks."""
        if self.size == 1:
            return list(numbers)
        own = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self.group)
        return torch.cat(found).tolist()

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return tensor
        moved = tensor.to(self.device, copy=True)
        dist.all_reduce(moved, operation, group=self.group)
        return moved.cpu()
