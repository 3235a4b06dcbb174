"""Exact global top-k over many tensors, without a copy of them all.

A global hard mask keeps exactly k of N logits. The k-th highest value is found by a radix selection over
the bit patterns of the floats, with two histograms of 65,536 bins, one tensor at a time; ties at that value are
kept in index order. The result depends only on the values, not on the device or the number of ranks.
For tensors that are sharded over ranks (see :mod:`leap_pl.distributed.shards`) each rank counts its own part and the
histograms are summed: two all-reduces of 512 KiB, whatever the size of the model.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from leap_pl.distributed.shards import Ranks, offset_of, own_part, sharded_like

_CHUNK = 1 << 24  # elements at a time: 64 MiB of int32


@dataclass(frozen=True)
class Cut:
    """Threshold of one tensor's kept elements.

    Attributes:
        value: Elements above this value are kept.
        tie_limit: Elements equal to ``value`` are kept if their flat index, in the whole tensor, is below this limit.
    """

    value: float
    tie_limit: int

    def mask(self, tensor: Tensor) -> Tensor:
        """Return the mask of the kept elements of ``tensor`` (float32): bool, of the same shape and sharding."""
        part = own_part(tensor)
        kept = (part > self.value).contiguous()
        if self.tie_limit > 0:
            below = max(self.tie_limit - offset_of(tensor), 0)  # of the flat part; no index of each element is made
            flat = kept.view(-1)[:below]
            flat |= part.reshape(-1)[:below] == self.value
        return sharded_like(kept, tensor)


def exact_top_k(tensors: Sequence[Tensor], k: int) -> list[Cut]:
    """Return the cuts that keep exactly the ``k`` highest elements over all ``tensors`` together.

    Args:
        tensors: Float32 tensors of any shapes; equal values rank by tensor, then by flat index. Either all are whole,
            or all are sharded over the same ranks, which must all call this function. The tensors are read four times,
            one after another, so that a sequence may load each from disk on access.
        k: Number of elements to keep, 0 to their total number.

    Returns:
        One :class:`Cut` for each tensor; their masks have ``k`` true elements in total.

    Raises:
        ValueError: A tensor contains NaN, or ``k`` is out of range.
    """
    total, broken, ranks = _survey(tensors)
    if not 0 <= k <= total:
        raise ValueError(f"cannot keep the {k} highest of {total} elements")
    if ranks.any(broken):
        raise ValueError("a tensor contains NaN, which cannot be ranked")
    if k == 0:
        return [Cut(float("inf"), 0)] * len(tensors)

    none = torch.zeros(1 << 16, dtype=torch.int64, device="cpu")
    counts = ranks.sum(sum((_histogram(key >> 16) for key in _keys(tensors)), none))
    high, above = _bin_of(counts, k)
    counts = ranks.sum(sum((_histogram(key[key >> 16 == high] & 0xFFFF) for key in _keys(tensors)), none))
    low, above_low = _bin_of(counts, k - above)
    ties_kept = k - above - above_low
    value = _value_of((high << 16) | low)
    if not ties_kept:
        return [Cut(value, 0)] * len(tensors)

    ties = [offset_of(tensor) + (own_part(tensor).reshape(-1) == value).nonzero().flatten() for tensor in tensors]
    limits = []
    for own, before in zip(ties, _before(ranks, [len(own) for own in ties]), strict=True):
        taken = min(max(ties_kept - before, 0), len(own))
        limits.append(int(own[taken - 1]) + 1 if taken else 0)
    return [Cut(value, limit) for limit in ranks.highest(limits)]


def closest_top_k(tensors: Sequence[Tensor], removable: Iterable[Tensor], removed: int) -> list[Cut]:
    """Return cuts that keep the highest elements, as many as bring what the others remove closest to ``removed``.

    For logits that each stand for many weights: those of tiles, rows or heads.

    Args:
        tensors: Float32, few elements in all, whole; equal values rank by tensor, then by flat index.
        removable: Integer number of weights that each element of ``tensors`` removes if it is not kept.
        removed: How many weights are to be removed. Of two numbers as close, more are removed.

    Returns:
        One :class:`Cut` for each tensor.
    """
    # On the CPU, for they are few: two host syncs on an accelerator, however many tensors there are.
    together = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    sizes = torch.cat([each.flatten() for each in removable]).cpu().to(torch.int64)
    order = together.argsort(descending=True, stable=True)
    left = sizes.sum() - torch.cat([sizes.new_zeros(1), sizes[order].cumsum(0)])
    distance = (left - removed).abs()
    (cut,) = exact_top_k([together], int((distance == distance.min()).nonzero()[0]))
    starts = accumulate((tensor.numel() for tensor in tensors[:-1]), initial=0)
    return [Cut(cut.value, max(cut.tie_limit - start, 0)) for start in starts]


def _survey(tensors: Sequence[Tensor]) -> tuple[int, bool, Ranks]:
    """Return the number of elements, whether any on this rank is NaN, and the ranks that share them."""
    total, broken, ranks = 0, False, Ranks()
    for tensor in tensors:
        total += tensor.numel()
        broken |= bool(torch.isnan(own_part(tensor)).any())
        ranks = Ranks.of([tensor])
    return total, broken, ranks


def _before(ranks: Ranks, own: list[int]) -> list[int]:
    """Return, for each tensor, the number of ties before this rank's part: tensor by tensor, then rank by rank."""
    counts_RT = torch.tensor(ranks.gather(own), device="cpu").view(-1, len(own))
    in_order = counts_RT.T.flatten()
    before_RT = (in_order.cumsum(0) - in_order).view(len(own), -1).T
    return [int(n) for n in before_RT[ranks.rank]]


def _keys(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield each tensor in pieces, as 32-bit keys in int64 that have the same order as the floats."""
    for tensor in tensors:
        for piece in own_part(tensor).detach().reshape(-1).split(_CHUNK):
            # + 0.0: minus zero equals zero, and must have the same key.
            pattern = (piece.float() + 0.0).view(torch.int32).to(torch.int64)
            yield torch.where(pattern < 0, ~pattern, pattern + (1 << 31)) & 0xFFFFFFFF


def _value_of(key: int) -> float:
    pattern = key - (1 << 31) if key >= 1 << 31 else ~key
    return float(torch.tensor(pattern, dtype=torch.int64, device="cpu").to(torch.int32).view(torch.float32))


def _histogram(digits: Tensor) -> Tensor:
    return torch.bincount(digits, minlength=1 << 16).cpu()


def _bin_of(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bin of the k-th highest element, and the number of elements in the bins above it."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return (1 << 16) - 1 - place, above
