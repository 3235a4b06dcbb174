"""Tensors that are sharded over ranks: what this rank holds of one, and what the ranks add up.

Under FSDP2 a rank holds of each weight and its logits one slice along the first dimension: a ``DTensor`` with the
placement ``Shard(0)``. Everything here takes plain tensors as well, of which a rank holds all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


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


@torch.no_grad()
def copy_part_(tensor: Tensor, whole: Tensor) -> None:
    """Write into this rank's part of ``tensor`` what belongs there of ``whole``, a plain tensor of its shape."""
    part, start = own_part(tensor), offset_of(tensor)
    part.copy_(whole.reshape(-1)[start : start + part.numel()].view(part.shape))


def gathered(tensor: Tensor) -> Tensor:
    """The whole of ``tensor``, on every rank; each of them makes this call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def strided_samples(tensors: Mapping[str, Tensor], stride: int) -> dict[str, Tensor]:
    """Every ``stride``-th element of each of ``tensors``, flattened: whole on every rank.

    Args:
        tensors: All of them whole, or all sharded over the same ranks, each of which makes this call.
        stride: Elements from one to the next, in the whole tensor.
    """
    ranks = Ranks.of(tensors.values())
    own = [own_part(tensor).reshape(-1)[-offset_of(tensor) % stride :: stride] for tensor in tensors.values()]
    if ranks.size == 1:
        return dict(zip(tensors, own, strict=True))
    counts = torch.tensor(ranks.gather([part.numel() for part in own])).view(ranks.size, -1).tolist()
    together = torch.cat(own)
    # To one length, for the collective.
    padded = torch.cat([together, together.new_zeros(max(map(sum, counts)) - len(together))])
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded, group=ranks.group)
    split = [held[: sum(count)].split(count) for held, count in zip(found, counts, strict=True)]
    return {name: torch.cat([parts[place] for parts in split]) for place, name in enumerate(tensors)}


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
    device: str | torch.device = "cpu"

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
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self.group)
        return [int(n) for n in torch.cat(found)]

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        if self.size == 1:
            return tensor
        moved = tensor.to(self.device, copy=True)
        dist.all_reduce(moved, how, group=self.group)
        return moved.cpu()
