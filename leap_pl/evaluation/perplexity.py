"""Perplexity of a causal language model on one sequence of tokens, by the standard protocol.

The text is tokenized once and read in windows of ``seq_length`` tokens that start every ``stride`` tokens. Each token
of a window is predicted from the preceding ones in the window; where windows overlap, a token counts only the first
time. Tokens after the last complete window are ignored, as in published results.

A prefix, such as BOS, is part of each window and never predicted: every token of the text is then predicted, whereas
without one the first token of each window is not.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from leap_pl.base_model.backbone import Head, States, evaluating, split_model
from leap_pl.base_model.sequence_length import check_sequence_length
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
        seq_length: Tokens in a window, with its prefix.
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
    prefix: Sequence[int] = (),
    leading: int = 0,
    batch_size: int = 4,
    progress: str | None = None,
) -> Perplexity:
    """Measure the perplexity of ``model`` on ``tokens``.

    Args:
        model: A causal language model, on its device.
        tokens: LongTensor[tokens], the whole text. A text shorter than a window is one short window.
        seq_length: Tokens in a window, with its prefix.
        stride: Distance between the starts of consecutive windows, in tokens; by default their number in a window, so
            that windows do not overlap.
        prefix: Tokens that each window begins with (:func:`leap_pl.base_model.prefix.prefix_of`), not counted in
            ``tokens``.
        leading: Number of tokens at the beginning of ``tokens`` that are no text, and are not predicted.
        batch_size: Windows in a forward pass; it affects the value only by rounding.
        progress: Caption of a progress bar; None for no bar.

    Raises:
        UserError: If ``seq_length``, ``stride`` or ``batch_size`` is out of range, ``seq_length`` exceeds the model's
            positions, the text has no token to predict, or the model's logits are not finite.
    """
    stride = seq_length - len(prefix) if stride is None else stride
    check_windows(seq_length, stride, batch_size, len(prefix))
    given = max(len(prefix), 1)  # tokens of a window that are never predicted
    prefix_P = torch.tensor(prefix, dtype=tokens.dtype, device=tokens.device)
    of_first = max(given, leading)
    _check(model, tokens, prefix_P, seq_length)
    windows = tokens.unfold(0, min(seq_length - len(prefix), tokens.numel()), stride)  # (window, length), a view
    length = len(prefix) + windows.shape[1]
    if length <= of_first:
        raise UserError(
            f"a window of {length} tokens begins with {of_first} that are not predicted. Give a longer text, or a "
            "larger seq_length."
        )
    later = min(stride, length - given)  # predicted tokens of a window after the first; the rest is context
    with evaluating(model):
        states, head = split_model(model)
        sums = torch.cat(
            [
                _window_nll(
                    states,
                    head,
                    torch.cat([prefix_P.expand(len(batch), -1), batch], 1).to(model.device),
                    [of_first if window == 0 else length - later for window in range(first, first + len(batch))],
                    max(1, LOSS_ELEMENTS // vocabulary_of(model)),
                )
                for first, batch in _batches(windows, batch_size, progress)
            ]
        )
    if not torch.isfinite(sums).all():
        bad = int((~torch.isfinite(sums)).sum())
        raise UserError(
            f"the model's logits are not finite in {bad} of {len(sums)} windows. "
            "Evaluate in another precision (--dtype float32), or check the weights."
        )
    counts = torch.full_like(sums, later)
    counts[0] = length - of_first
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


def check_windows(seq_length: int, stride: int, batch_size: int, prefix: int = 0) -> None:
    """Check that window, stride and batch size are in range, for windows that begin with ``prefix`` tokens.

    Raises:
        UserError: If one is not.
    """
    if seq_length < max(2, prefix + 1) or batch_size < 1 or not 1 <= stride <= seq_length - prefix:
        most = f"seq_length − {prefix}, without what the tokenizer puts before a text" if prefix else "seq_length"
        raise UserError(
            f"seq_length {seq_length}, stride {stride}, batch_size {batch_size}: seq_length must be at least "
            f"{max(2, prefix + 1)}, stride from 1 to {most}, and batch_size at least 1."
        )


def _check(model: "PreTrainedModel", tokens: Tensor, prefix: Tensor, seq_length: int) -> None:
    check_sequence_length(model.config, seq_length, "the model", "--seq_length")
    least = 1 if len(prefix) else 2
    if tokens.numel() < least:
        needs = "one" if len(prefix) else "two"
        raise UserError(f"the text has {tokens.numel()} tokens, and perplexity needs {needs}. Give a longer text.")
    check_tokens(torch.cat([prefix, tokens]), vocabulary_of(model), "the model")


def _batches(windows: Tensor, batch_size: int, progress: str | None) -> Iterator[tuple[int, Tensor]]:
    """Yield batches of windows, each with the index of its first window."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

    with tqdm(total=len(windows), desc=progress, unit="window", disable=progress is None, leave=False) as bar:
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            yield first, batch
            bar.update(len(batch))


def _window_nll(states: States, head: Head, inputs_BT: Tensor, firsts: Sequence[int], step: int) -> Tensor:
    """Return the summed NLL of each window's tokens from the index in ``firsts`` on: float64 (window,) on the CPU."""
    sums = []
    for first, inputs_T, states_TD in zip(firsts, inputs_BT, states(inputs_BT), strict=True):
        targets, before_TD = inputs_T[first:], states_TD[first - 1 : -1]
        losses = []
        for at in range(0, len(targets), step):
            logits_CV = head(before_TD[at : at + step]).float()
            targets_C = targets[at : at + step].to(logits_CV.device)  # a device_map may place the head elsewhere
            losses.append(nn.functional.cross_entropy(logits_CV, targets_C, reduction="none"))
        sums.append(torch.cat(losses).cpu().double().sum())  # waits once a window; not every device has float64
    return torch.stack(sums)


def _stderr(sums: Tensor, counts: Tensor, nll: float) -> float | None:
    """Return the standard error of the mean NLL, a ratio of sums over windows."""
    windows = len(sums)
    if windows < 2:
        return None
    residuals = sums - nll * counts
    return float((residuals.square().sum() / (windows - 1)).sqrt() * math.sqrt(windows) / counts.sum())
