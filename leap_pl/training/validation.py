"""What a run measures on its validation text, and of what each figure is."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from leap_pl.base_model.backbone import Head
from leap_pl.gates.gate import Mode

WORDS = 4  # of 8 bytes, in the digest of a sequence: all of SHA-256


@dataclass(frozen=True)
class Measured:
    """A perplexity, and all that it is of: it stands for another measurement only where these are the same.

    Attributes:
        value: The perplexity.
        tokens: Digest of the sequences that it was measured on (:meth:`Validation.measured_tokens`), 16 digits.
        sequences: How many they are, on all ranks together.
        seq_length: Tokens in each of them; the mean where they differ.
        fingerprint: Of the base model's weights.
        dtype: Of the model.
        precision: Of the trainer.
    """

    value: float
    tokens: str
    sequences: int
    seq_length: float
    fingerprint: str
    dtype: str
    precision: str

    @property
    def of(self) -> dict[str, Any]:
        """All but the value, as plain values."""
        return {key: value for key, value in asdict(self).items() if key != "value"}

    @classmethod
    def read(cls, value: Any, of: Any) -> Self | None:
        """Return the figure that a checkpoint tells; None where it does not say of what ``value`` is, or not in full.

        Args:
            value: The perplexity.
            of: As :attr:`of`; what else is in it is left out.
        """
        keys = {"tokens": str, "sequences": int, "seq_length": float, "fingerprint": str, "dtype": str}
        keys["precision"] = str
        if not isinstance(value, float) or not math.isfinite(value) or not isinstance(of, Mapping):
            return None
        if not all(type(of.get(key)) is kind for key, kind in keys.items()):
            return None
        return cls(value, **{key: of[key] for key in keys})


class Validation(nn.Module):
    """Perplexities of the hard mask, anew in every validation, and of the dense model, once for what it is of.

    Attributes:
        hard: Of the last validation that came to its end; None before one.
        hard_step: The optimizer steps that were done then.
        dense: Of the dense model; None before the first validation's end.
        batches: The tokens (B, L) that the validation at hand has measured on this rank so far.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        super().__init__()
        self.hard_metric, self.dense_metric = Perplexity(), Perplexity()
        self.hard: Measured | None = None
        self.hard_step: int | None = None
        self.dense: Measured | None = None
        self.batches: list[Tensor] = []

    def begin(self) -> None:
        """Start a validation with nothing counted: the last one may have been broken off."""
        self.hard_metric.reset()
        self.dense_metric.reset()
        self.batches = []

    def read(self, dense: Any, dense_of: Any, settings: Mapping[str, Any]) -> None:
        """Take up the figures of a checkpoint: those that say of what they are.

        Args:
            dense: Perplexity of the dense model.
            dense_of: What it is of.
            settings: ``perplexity`` of the hard mask, with ``perplexity_of``.
        """
        self.dense = Measured.read(dense, dense_of)
        of = settings.get("perplexity_of")
        self.hard = Measured.read(settings.get("perplexity"), of)
        self.hard_step = of.get("step") if isinstance(of, Mapping) else None

    @property
    def wanted(self) -> list[Mode]:
        """The modes that are to be measured batch by batch: the dense model while nothing is known of it."""
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

    def measured_tokens(self) -> Tensor:
        """Sum up this rank's sequences so far, for ranks to add: int64 (WORDS + 2,).

        The sum of the sequences' digests, which depends neither on their order nor on batches or ranks; how many
        they are; how many tokens.
        """
        total = torch.zeros(WORDS + 2, dtype=torch.int64, device="cpu")
        for ids_BL in self.batches:
            for ids_L in ids_BL.cpu().to(torch.int64).contiguous():
                digest = hashlib.sha256(ids_L.numpy().tobytes()).digest()
                # Sums wrap around.
                total[:WORDS] += torch.frombuffer(bytearray(digest), dtype=torch.int64)
                total[WORDS:] += torch.tensor([1, len(ids_L)], device="cpu")
        return total

    def finish(self, total: Tensor, step: int, of: Mapping[str, str]) -> tuple[Measured, Measured]:
        """Return the perplexities of the hard mask and of the dense model, over all ranks, at a validation's end.

        Args:
            total: :meth:`measured_tokens`, added up over all ranks.
            step: Optimizer steps that are done.
            of: What else the figures are of: ``fingerprint``, ``dtype``, ``precision``.
        """
        told = described(total) | dict(of)
        self.hard, self.hard_step = Measured(float(self.hard_metric.compute()), **told), step
        if self.dense is None:
            self.dense = Measured(float(self.dense_metric.compute()), **told)
        self.batches = []
        return self.hard, self.dense


def described(total: Tensor) -> dict[str, Any]:
    """Say which sequences a sum of :meth:`Validation.measured_tokens` is of, in the words of :class:`Measured`."""
    total = total.cpu()
    sequences, tokens = total[WORDS:].tolist()
    digest = hashlib.sha256(total.numpy().tobytes()).hexdigest()[:16]
    return {"tokens": digest, "sequences": sequences, "seq_length": tokens / max(sequences, 1)}
