"""Perplexities of a run on its validation text, with what each was measured on."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.text import Perplexity

from leap_pl.base_model.backbone import Head
from leap_pl.gates.gate import Mode
from leap_pl.masks.mask_set import SPARSE_BASE

WORDS = 4  # 8-byte words in the digest of a sequence, a whole SHA-256


@dataclass(frozen=True)
class Measured:
    """Perplexity with the conditions of its measurement; it replaces another measurement only if they are the same.

    Attributes:
        value: Perplexity.
        tokens: Digest of the measured sequences (:meth:`Validation.measured_tokens`), 16 digits.
        sequences: Number of sequences on all ranks together.
        seq_length: Tokens in each sequence; the mean if they differ.
        fingerprint: Fingerprint of the weights in the base model's decoder blocks.
        dtype: Dtype of the model.
        precision: Precision of the trainer (:func:`precision_of`).
        rest: Fingerprint of its other weights; empty where an earlier version has measured.
    """

    value: float
    tokens: str
    sequences: int
    seq_length: float
    fingerprint: str
    dtype: str
    precision: str
    rest: str = ""

    @property
    def of(self) -> dict[str, Any]:
        """Return the conditions, all attributes but ``value``, as plain values."""
        return {key: value for key, value in asdict(self).items() if key != "value"}

    @classmethod
    def read(cls, value: Any, of: Any) -> Self | None:
        """Return the measurement that a checkpoint holds; None if its conditions are missing or incomplete.

        Args:
            value: Perplexity.
            of: Conditions as in :attr:`of`; other keys are ignored.
        """
        keys = {field.name: field.type for field in fields(cls) if field.name != "value"}
        if not isinstance(value, float) or not math.isfinite(value) or not isinstance(of, Mapping):
            return None
        of = {"rest": "", **of}
        if not all(type(of.get(key)) is kind for key, kind in keys.items()):
            return None
        return cls(value, **{key: of[key] for key in keys})


class TokenPerplexity(Perplexity):
    """Perplexity of torchmetrics, from log-probabilities that are never those of a probability rounded to 0.

    Its own update takes the logarithm of a softmax, which is infinite for a token 104 nats below the likeliest, or 87
    where denormal numbers are flushed: one such token in the text of a broken prior, and there is no perplexity.
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add the predictions of some tokens.

        Args:
            preds: Logits (…, V), float32.
            target: Tokens (…).
        """
        self.total_log_probs += cross_entropy(preds.flatten(0, -2), target.flatten(), reduction="sum")
        self.count += target.numel()


class Validation(nn.Module):
    """Perplexities of the hard mask, measured in every validation, and of the dense model, measured once.

    Attributes:
        hard: Measurement of the hard mask in the last complete validation; None before one.
        hard_step: Completed optimizer steps at that validation.
        dense: Measurement of the dense model; None before the end of the first validation.
        sparse_base: Whether the base model, which is measured as the dense one, was sparse before the run.
        start: Measurement of the hard mask before the first step of the run, which is the prior's; None without one.
        batches: Tokens (B, L) that the current validation has measured on this rank so far.
    """

    def __init__(self) -> None:
        """Initialize without measurements."""
        super().__init__()
        # Of torch's default data type otherwise, which Lightning may set to half precision.
        self.hard_metric, self.dense_metric = (TokenPerplexity().set_dtype(torch.float32) for _ in range(2))
        self.hard: Measured | None = None
        self.hard_step: int | None = None
        self.dense: Measured | None = None
        self.start: Measured | None = None
        self.sparse_base = False
        self.batches: list[Tensor] = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the sums of the metrics, but keep their data types: a sum in half precision stops growing."""
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), recurse)

    def begin(self) -> None:
        """Start a validation with empty metrics: the last one may have been interrupted."""
        self.hard_metric.reset()
        self.dense_metric.reset()
        self.batches = []

    def read(self, dense: Any, dense_of: Any, settings: Mapping[str, Any]) -> None:
        """Load the measurements of a checkpoint that have complete conditions.

        Args:
            dense: Perplexity of the dense model.
            dense_of: Conditions of ``dense``.
            settings: Settings with the ``perplexity`` of the hard mask, and its conditions ``perplexity_of``.
        """
        self.dense = Measured.read(dense, dense_of)
        of = settings.get("perplexity_of")
        self.hard = Measured.read(settings.get("perplexity"), of)
        self.hard_step = of.get("step") if isinstance(of, Mapping) else None

    @property
    def wanted(self) -> list[Mode]:
        """Return the modes that each batch is to be measured in; ``dense`` only while there is no measurement of it."""
        return ["hard"] if self.dense is not None else ["hard", "dense"]

    @torch.no_grad()
    def update(self, mode: Mode, hidden_BTD: Tensor, targets_BT: Tensor, head: Head, chunk: int) -> None:
        """Add the model's predictions for a batch, with its gates in ``mode``, to the metric of that mode.

        Args:
            mode: Mode of the gates, ``hard`` or ``dense``.
            hidden_BTD: Last hidden states.
            targets_BT: Token that follows each.
            head: Head of the model: hidden states (C, D) → logits (C, V).
            chunk: Number of tokens whose logits are computed at once.
        """
        metric = self.hard_metric if mode == "hard" else self.dense_metric
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), targets_BT.flatten()
        for start in range(0, len(targets_N), chunk):
            part = slice(start, start + chunk)
            metric.update(head(hidden_ND[part]).float()[None], targets_N[None, part])

    def measured_tokens(self) -> Tensor:
        """Return a summary of this rank's sequences so far, int64 (WORDS + 2,), whose sum over ranks is that of all.

        It has the sum of the sequences' digests, which depends neither on their order nor on batches or ranks; the
        number of sequences; and the number of tokens.
        """
        total = torch.zeros(WORDS + 2, dtype=torch.int64, device="cpu")
        for ids_BL in self.batches:
            for ids_L in ids_BL.cpu().to(torch.int64).contiguous():
                digest = hashlib.sha256(ids_L.numpy().tobytes()).digest()
                # Integer overflow wraps around, so the sum is well defined.
                total[:WORDS] += torch.frombuffer(bytearray(digest), dtype=torch.int64)
                total[WORDS:] += torch.tensor([1, len(ids_L)], device="cpu")
        return total

    def finish(
        self, total: Tensor, step: int, of: Mapping[str, str], *, fitting: bool = True
    ) -> tuple[Measured, Measured]:
        """Finish a validation, and return the perplexities of the hard mask and the dense model over all ranks.

        Args:
            total: Sum of :meth:`measured_tokens` over all ranks.
            step: Completed optimizer steps.
            of: Other conditions of the measurements: ``fingerprint``, ``dtype``, ``precision``.
            fitting: Whether a fit validates: step 0 of another trainer is no start, but of whatever was learned.
        """
        conditions = describe_sequences(total) | dict(of)
        self.hard, self.hard_step = Measured(float(self.hard_metric.compute()), **conditions), step
        if self.dense is None:
            self.dense = Measured(float(self.dense_metric.compute()), **conditions)
        if step == 0 and fitting:
            self.start = self.hard
        self.batches = []
        return self.hard, self.dense

    def record(self) -> dict[str, Any]:
        """Return the measurements with their conditions, for the provenance of a mask; :meth:`read` takes them back."""
        recorded: dict[str, Any] = {}
        if self.hard is not None:
            recorded |= {"perplexity": self.hard.value, "perplexity_of": {**self.hard.of, "step": self.hard_step}}
        if self.dense is not None:
            recorded |= {"dense_perplexity": self.dense.value, "dense_perplexity_of": self.dense.of}
        return recorded | ({SPARSE_BASE: True} if self.sparse_base else {})

    def figures(self) -> dict[str, float]:
        """Return the perplexities of the last validation, and those measured on the same text: name → value.

        The names are ``hard``, ``dense`` and ``prior``; a measurement under other conditions is left out.
        """
        if self.hard is None:
            return {}
        found = {"hard": self.hard, "dense": self.dense, "prior": self.start}
        return {name: one.value for name, one in found.items() if one is not None and one.of == self.hard.of}

    def summary(self, step: int) -> str:
        """Return :meth:`figures` in words: ``perplexity 17.89 (dense 14.65, prior 32.40)``; empty if there are none.

        Args:
            step: Completed optimizer steps now; figures of another step say of which.
        """
        figures = self.figures()
        if not figures:
            return ""
        words = {"dense": "base model"} if self.sparse_base else {}
        others = ", ".join(f"{words.get(name, name)} {value:.2f}" for name, value in figures.items() if name != "hard")
        at = "" if self.hard_step in (step, None) else f" at step {self.hard_step}"
        return f"perplexity {figures['hard']:.2f}{f' ({others})' if others else ''}{at}"


def precision_of(precision: Any) -> str:
    """Return the condition :attr:`Measured.precision` for the ``precision`` of a trainer.

    Earlier versions summed in the data type of a true half precision: their figures are of something else.
    """
    return f"{precision}, sums in float32" if precision in ("bf16-true", "16-true") else str(precision)


def describe_sequences(total: Tensor) -> dict[str, Any]:
    """Describe the sequences of a sum of :meth:`Validation.measured_tokens` by attributes of :class:`Measured`."""
    total = total.cpu()
    sequences, tokens = total[WORDS:].tolist()
    digest = hashlib.sha256(total.numpy().tobytes()).hexdigest()[:16]
    return {"tokens": digest, "sequences": sequences, "seq_length": tokens / max(sequences, 1)}
