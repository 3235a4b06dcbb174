"""Perplexity of a causal language model on one sequence of tokens, by the standard protocol.

The text is tokenized once and read in windows of ``seq_length`` tokens that start every ``stride`` tokens. Each token
of a window is predicted from the preceding ones in the window; where windows overlap, a token counts only the first
time. Tokens after the last complete window are ignored, as in published results.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from leap_pl.base_model.loading import check_sequence_length
from leap_pl.base_model.vocabulary import check_tokens, vocabulary_of
from leap_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOSS_ELEMENTS = 1 << 25  # fp32 logits per chunk of the loss: 128 MiB


@dataclass(frozen=True)
class Perplexity:
    """Perplexity with the settings needed to reproduce it.

    Attributes:
        nll: Mean negative log-likelihood (NLL) of the predicted tokens, in nats.
        nll_stderr: Standard error of ``nll`` over windows, which are far less dependent than tokens; None for one
            window.
        seq_length: Tokens in a window.
        stride: Distance between the starts of consecutive windows, in tokens.
        tokens: Length of the text, in tokens.
        predicted: Number of predicted tokens.
        window_nll: Mean NLL of the predicted tokens of each window.
    """

    nll: float
    nll_stderr: float | None
    seq_length: int
    stride: int
    tokens: int
    predicted: int
    window_nll: tuple[float, ...]

    @property
    def value(self) -> float:
        """Return the perplexity, exp(nll)."""
        return math.exp(min(self.nll, 700.0))  # finite even for a broken model

    @property
    def stderr(self) -> float | None:
        """Return the standard error of ``value`` (delta method)."""
        return None if self.nll_stderr is None else self.value * self.nll_stderr


@torch.inference_mode()
def perplexity(
    model: "PreTrainedModel",
    tokens: Tensor,
    *,
    seq_length: int = 2048,
    stride: int | None = None,
    batch_size: int = 4,
    progress: str | None = None,
) -> Perplexity:
    """Measure the perplexity of ``model`` on ``tokens``.

    Args:
        model: A causal language model, on its device.
        tokens: LongTensor[tokens], the whole text. A text shorter than a window is one short window.
        seq_length: Tokens in a window.
        stride: Distance between the starts of consecutive windows, in tokens; by default ``seq_length``, so that
            windows do not overlap.
        batch_size: Windows in a forward pass; it affects the value only by rounding.
        progress: Caption of a progress bar; None for no bar.

    Raises:
        UserError: If ``seq_length``, ``stride`` or ``batch_size`` is out of range, ``seq_length`` exceeds the model's
            positions, the text has fewer than two tokens, or the model's logits are not finite.
    """
    stride = seq_length if stride is None else stride
    check_windows(seq_length, stride, batch_size)
    _check(model, tokens, seq_length)
    length = min(seq_length, tokens.numel())
    windows = tokens.unfold(0, length, stride)  # (window, length), a view
    was_training = model.training
    model.eval()
    sums = torch.cat(
        [_window_nll(model, batch, stride, first) for first, batch in _batches(windows, batch_size, progress)]
    )
    model.train(was_training)
    if not torch.isfinite(sums).all():
        bad = int((~torch.isfinite(sums)).sum())
        raise UserError(
            f"the model's logits are not finite in {bad} of {len(sums)} windows. "
            "Evaluate in another precision (--dtype float32), or check the weights."
        )
    counts = torch.full_like(sums, min(stride, length - 1))
    counts[0] = length - 1
    predicted = int(counts.sum())
    nll = float(sums.sum() / predicted)
    return Perplexity(
        nll=nll,
        nll_stderr=_stderr(sums, counts, nll),
        seq_length=seq_length,
        stride=stride,
        tokens=tokens.numel(),
        predicted=predicted,
        window_nll=tuple((sums / counts).tolist()),
    )


def check_windows(seq_length: int, stride: int, batch_size: int) -> None:
    """Check that window, stride and batch size are in range.

    Raises:
        UserError: If one is not.
    """
    if seq_length < 2 or batch_size < 1 or not 1 <= stride <= seq_length:
        raise UserError(
            f"seq_length {seq_length}, stride {stride}, batch_size {batch_size}: seq_length must be at least 2, stride "
            "from 1 to seq_length, and batch_size at least 1."
        )


def _check(model: "PreTrainedModel", tokens: Tensor, seq_length: int) -> None:
    check_sequence_length(model.config, seq_length, "the model", "--seq_length")
    if tokens.numel() < 2:
        raise UserError(f"the text has {tokens.numel()} tokens, and perplexity needs two. Give a longer text.")
    check_tokens(tokens, vocabulary_of(model), "the model")


def _batches(windows: Tensor, batch_size: int, progress: str | None) -> Iterator[tuple[int, Tensor]]:
    """Yield batches of windows, each with the index of its first window."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

    with tqdm(total=len(windows), desc=progress, unit="window", disable=progress is None, leave=False) as bar:
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            yield first, batch
            bar.update(len(batch))


def _window_nll(model: "PreTrainedModel", windows: Tensor, stride: int, first: int) -> Tensor:
    """Return the summed NLL of the predicted tokens of each window: float64 (window,) on the CPU."""
    inputs_BT = windows.to(model.device)
    logits_BTV = model(input_ids=inputs_BT, use_cache=False).logits
    length = inputs_BT.shape[1]
    sums = []
    for window, (inputs_T, logits_TV) in enumerate(zip(inputs_BT, logits_BTV, strict=True), start=first):
        # A later window predicts only its last `stride` tokens; the rest is context.
        start = 0 if window == 0 else max(length - 1 - stride, 0)
        targets, predictions = inputs_T[1 + start :], logits_TV[start:-1]
        step = max(1, LOSS_ELEMENTS // logits_TV.shape[-1])
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for at in range(0, len(targets), step):
            losses = nn.functional.cross_entropy(
                predictions[at : at + step].float(), targets[at : at + step], reduction="none"
            )
            total += losses.double().sum().cpu()
        sums.append(total)
    return torch.stack(sums)


def _stderr(sums: Tensor, counts: Tensor, nll: float) -> float | None:
    """Return the standard error of the mean NLL, a ratio of sums over windows."""
    windows = len(sums)
    if windows < 2:
        return None
    residuals = sums - nll * counts
    return float((residuals.square().sum() / (windows - 1)).sqrt() * math.sqrt(windows) / counts.sum())
