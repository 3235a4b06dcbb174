"""n:m groups of m consecutive inputs of a weight, and the patterns of a group that keep n.

Legend of suffixes: P = patterns of a group, Q = groups of one weight, M = elements of a group; O = all
dimensions of the weight but its input dimension, G = groups along the input dimension, so that Q = O·G.

A weight is viewed with its inputs last: (O, inputs) → (Q, M). Where m does not divide the inputs, the last
group of each row is short and padded with zeros; of its r inputs it keeps n·r/m, rounded as in one-shot
pruning (:class:`leap_pl.masks.patterns.NM`).

The logits are (P, O, G): the softmax over patterns then operates element-wise on P long contiguous vectors, which
suits both the vector units of a CPU and the warps of a GPU.
"""

from functools import cached_property, lru_cache
from itertools import combinations
from math import comb
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leap_pl.errors import UserError
from leap_pl.masks.patterns import NM

MOST_PATTERNS = 1024  # for one group: 5:10 has 252, 6:12 has 924, and 8:16 has 12,870 logits for 16 weights

FORBIDDEN = -1e9
"""Logit of a pattern that is invalid in a short group: its probability is exactly 0, so it gets no gradient."""


def scaled(logits: Tensor, slope: Tensor) -> Tensor:
    """Return ``slope``·``logits`` in float32; of what is forbidden a far lower number, also where the slope is 0."""
    logits = logits.to(torch.float32)
    # Literals: torch.compile makes inputs of a module's numbers, and kernels with such inputs are not called directly.
    # −5e8 lies between FORBIDDEN, which bfloat16 rounds, and any logit; −1e30 below every score, also with τ near 0.
    return torch.where(logits < -5e8, -1e30, slope * logits)


class Groups:
    """Groups of one weight.

    Attributes:
        pattern: Sparsity pattern n:m.
        shape: Shape of the weight.
        input_dim: Input dimension of the weight.
        inputs: Number of inputs.
        others: Sizes of the weight's other dimensions.
        short: Number of inputs in the short last group of a row; 0: all groups are whole.
        patterns: Positions that each pattern keeps, in the order of :func:`itertools.combinations`.
        allowed_P: Bool vector of the patterns that are valid in a short group.
    """

    def __init__(self, n: int, m: int, shape: torch.Size, input_dim: int) -> None:
        """Divide a weight of the given shape into n:m groups.

        Raises:
            UserError: n and m are invalid, or give more than MOST_PATTERNS patterns.
        """
        self.pattern = NM(n, m)
        if comb(m, n) > MOST_PATTERNS:
            raise UserError(
                f"{n}:{m} gates need a logit for each of {comb(m, n):,} patterns of a group of {m} weights; "
                f"the maximum is {MOST_PATTERNS}. Use a smaller m, as in 2:4 or 4:8."
            )
        self.patterns = tuple(combinations(range(m), n))
        self.shape, self.input_dim = shape, input_dim
        self.inputs = shape[input_dim]
        self.others = tuple(size for dim, size in enumerate(shape) if dim != input_dim % len(shape))
        self.short = self.inputs % m
        self.allowed_P = torch.tensor([self._fits(positions) for positions in self.patterns], device="cpu")

    @property
    def logits_shape(self) -> tuple[int, ...]:
        """Return (P, O, G), with all dimensions of O."""
        return (len(self.patterns), *self.others, -(-self.inputs // self.pattern.m))

    @cached_property
    def kept(self) -> int:
        """Return the number of elements that are kept, which is the same for any choice of patterns."""
        whole, rest = divmod(self.inputs, self.pattern.m)
        return (whole * self.pattern.n + self.pattern.kept(rest)) * torch.Size(self.others).numel()

    def _fits(self, positions: tuple[int, ...]) -> bool:
        """Return whether the pattern is valid in a short group of r inputs.

        It must keep :meth:`NM.kept` of them; of patterns that differ only beyond the r-th input, one is valid.
        """
        keep = self.pattern.kept(self.short)
        beyond = tuple(range(self.short, self.short + self.pattern.n - keep))
        return sum(position < self.short for position in positions) == keep and positions[keep:] == beyond

    # -- layout -------------------------------------------------------------------------------------------

    def split(self, tensor: Tensor) -> Tensor:
        """Reshape a tensor of the weight's shape to (Q, M), with short groups padded with zeros."""
        return self.split_rows(tensor.movedim(self.input_dim, -1))

    def split_rows(self, rows_OI: Tensor) -> Tensor:
        """Reshape a tensor with its inputs last to (Q, M), with short groups padded with zeros."""
        if self.short:
            rows_OI = F.pad(rows_OI, (0, self.pattern.m - self.short))
        # Not a view: torch.compile specialises on the shape of a view's base.
        return rows_OI.reshape(-1, self.pattern.m).data

    def join(self, tensor_QM: Tensor) -> Tensor:
        """Invert :meth:`split`; the result is contiguous."""
        return self.join_rows(tensor_QM).movedim(-1, self.input_dim).contiguous()

    def join_rows(self, tensor_QM: Tensor) -> Tensor:
        """Invert :meth:`split_rows`."""
        return tensor_QM.reshape(*self.others, -1)[..., : self.inputs]

    def coordinates(self, index: Tensor) -> list[Tensor]:
        """Convert flat indices into the weight to coordinates with the input dimension last."""
        place: list[Tensor] = []
        for size in reversed(self.shape):  # not by torch.unravel_index, which copies the shape to the device
            place.insert(0, index % size)
            index = index // size
        place.append(place.pop(self.input_dim))
        return place

    # -- logits -------------------------------------------------------------------------------------------

    def shift_(self, logits: Tensor, prior: Tensor | None, lean: float) -> Tensor:
        """Add ``lean``·(agreement − its mean over the patterns) to the initial ``logits``, and return them.

        The agreement of a pattern is the number of its kept positions that the bool mask ``prior`` keeps. For 2:4
        and a 2:4 prior the difference is MaskLLM's (agreement − 1): −1, 0 or 1.
        """
        if prior is not None:
            kept_QM = self.split(prior.cpu().to(torch.float32))
            mean_Q = kept_QM.mean(1) * self.pattern.n
            for logits_Q, positions in zip(logits.view(len(self.patterns), -1), self.patterns, strict=True):
                logits_Q += (kept_QM[:, list(positions)].sum(1) - mean_Q) * lean
        return self.forbid_(logits)

    def forbid_(self, logits: Tensor) -> Tensor:
        """Set the logits of patterns that are invalid in short groups to FORBIDDEN in place, and return the logits."""
        if self.short:
            logits[~self.allowed_P.to(logits.device), ..., -1] = FORBIDDEN
        return logits

    def best(self, logits: Tensor) -> Tensor:
        """Return the bool mask, of the weight's shape, with the pattern of the highest logit in each group.

        Among equal logits the first pattern is chosen.
        """
        chosen_Q = first_highest(logits.reshape(len(self.patterns), -1))
        return self.join(self._table(logits.device).index_select(0, chosen_Q))

    def sample_best(self, logits: Tensor, stride: int) -> Tensor:
        """Return every ``stride``-th element of :meth:`best`, flattened, without computing the others."""
        size = torch.Size(self.shape).numel()
        *others, along = self.coordinates(torch.arange(0, size, stride, device=logits.device))
        group, position = along // self.pattern.m, along % self.pattern.m
        place: tuple[Any, ...] = (slice(None), *others, group)
        chosen = first_highest(logits[place])
        return self._table(logits.device)[chosen, position]

    def _table(self, device: torch.device) -> Tensor:
        return pattern_table(self.pattern.n, self.pattern.m, device)


@lru_cache(maxsize=64)
def pattern_table(n: int, m: int, device: torch.device, dtype: torch.dtype = torch.bool) -> Tensor:
    """Return the positions that each n:m pattern keeps as a table (P, M) of ones and zeros.

    It is cached and shared by all callers: an accelerator gets one copy, not one for each weight.
    """
    table = [[j in kept for j in range(m)] for kept in combinations(range(m), n)]
    return torch.tensor(table, dtype=dtype, device=device)


def first_highest(logits_PQ: Tensor) -> Tensor:
    """Return the int32 index of the maximum of each column; the lowest among ties, which argmax does not guarantee."""
    highest_Q = logits_PQ.amax(0)
    index_Q = torch.full_like(highest_Q, len(logits_PQ) - 1, dtype=torch.int32)
    for p in reversed(range(len(logits_PQ) - 1)):
        index_Q.masked_fill_(logits_PQ[p] == highest_Q, p)
    return index_Q
