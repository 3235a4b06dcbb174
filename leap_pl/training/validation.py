"""What a run measures on its validation text."""

import torch
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from leap_pl.gates.gate import Mode
from leap_pl.losses.objective import Head


class Validation(nn.Module):
    """Perplexities of the hard mask, anew in every validation, and of the dense model, once in a run.

    Attributes:
        hard: Of the last validation; None before one.
        dense: Of the first one.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        super().__init__()
        self.hard_metric, self.dense_metric = Perplexity(), Perplexity()
        self.hard: float | None = None
        self.dense: float | None = None

    @property
    def wanted(self) -> list[Mode]:
        """The modes that are still to be measured."""
        return ["hard"] if self.dense is not None else ["hard", "dense"]

    @torch.no_grad()
    def update(self, mode: Mode, hidden_BLD: Tensor, ids_BL: Tensor, head: Head, chunk: int) -> None:
        """Add what the model, with its gates in ``mode``, says of a batch.

        Args:
            mode: ``hard`` or ``dense``.
            hidden_BLD: Last hidden states.
            ids_BL: The tokens that led to them; each is predicted from those before it.
            head: Hidden states (C, D) → logits (C, V).
            chunk: Of so many tokens at once are there logits.
        """
        metric = self.hard_metric if mode == "hard" else self.dense_metric
        hidden_ND, targets_N = hidden_BLD[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten()
        for start in range(0, len(targets_N), chunk):
            part = slice(start, start + chunk)
            metric.update(head(hidden_ND[part]).float()[None], targets_N[None, part])

    def finish(self) -> tuple[float, float]:
        """The perplexities of the hard mask and of the dense model, over all ranks, at the end of a validation."""
        self.hard = float(self.hard_metric.compute())
        if self.dense is None:
            self.dense = float(self.dense_metric.compute())
        return self.hard, self.dense
