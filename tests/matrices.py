"""Random tokens, and the matrices of a model that are pruned with them."""

import torch
from torch import Tensor, nn

from leap_pl.base_model.weights import find_weights
from leap_pl.oneshot.inputs import Matrix


def tokens(sequences: int = 5, length: int = 40, seed: int = 0) -> Tensor:
    """Random tokens (N, T) of the byte tokenizer."""
    return torch.randint(0, 256, (sequences, length), generator=torch.Generator().manual_seed(seed))


def all_matrices(model: nn.Module) -> list[Matrix]:
    """Every matrix of every gated weight, that of each expert too."""
    return [matrix for weight in find_weights(model).values() for matrix in Matrix.of(weight)]
