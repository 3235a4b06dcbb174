"""Norms of large tensors, which PyTorch adds up inexactly on a CPU."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

LARGE = 1 << 24  # elements from which the norm on a CPU is computed row by row
LINE = 1 << 12  # elements of a line, of which a long vector has many


def norm_of(tensor: Tensor) -> Tensor:
    """Return the norm of ``tensor``, float32.

    On a CPU, the norm of a large tensor is computed from the norms of its rows, or of a vector's lines of LINE
    elements: PyTorch adds all squares in eight running float32 sums, each of which soon rounds away a part of every
    further square.
    """
    exact = None if tensor.dtype == torch.float64 else torch.float32  # torch converts to no narrower type
    if not is_large(tensor):
        return torch.linalg.vector_norm(tensor, dtype=exact).to(torch.float32)
    if tensor.ndim > 1:
        lines = [tensor.flatten(0, -2)]
    else:
        whole = tensor.numel() // LINE * LINE
        lines = [tensor[:whole].view(-1, LINE), tensor[whole:].view(1, -1)]
    norms = torch.cat([torch.linalg.vector_norm(part, dim=-1, dtype=exact) for part in lines])
    return torch.linalg.vector_norm(norms, dtype=torch.float64).to(torch.float32)


def is_large(tensor: Tensor) -> bool:
    """Return whether the norm of ``tensor`` is computed by lines."""
    return tensor.is_cpu and tensor.numel() >= LARGE and not isinstance(tensor, DTensor)
