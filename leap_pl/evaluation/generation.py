"""Continuation of a prompt by a model, with the time that its tokens take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leap_pl.base_model.prefix import prefix_of, without_suffix
from leap_pl.base_model.sequence_length import longest_sequence
from leap_pl.base_model.vocabulary import check_tokens, vocabulary_of
from leap_pl.data.documents import repaired
from leap_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Continuation:
    """Text that a model generated, and the time it took.

    Attributes:
        text: Continuation, without the prompt and special tokens.
        prompt_tokens: Tokens of the prompt.
        tokens: Generated tokens.
        first_seconds: Time to the first token, in which the prompt is read.
        next_seconds: Time of all other tokens together.
    """

    text: str
    prompt_tokens: int
    tokens: int
    first_seconds: float
    next_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Return the rate of the tokens after the first; None if there are none."""
        return (self.tokens - 1) / self.next_seconds if self.tokens > 1 else None


def continue_prompt(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> Continuation:
    """Generate the text that follows ``prompt``, until the end token or ``max_new_tokens``.

    Args:
        model: Causal language model, dense or with packed weights.
        tokenizer: Tokenizer of the model.
        prompt: Text to continue, as it is: no chat template is applied.
        max_new_tokens: Maximum number of tokens.
        temperature: Temperature of sampling from the model's distribution; 0 takes the most likely token. Of the
            model's generation config only the end token is read: no penalty of repetition, no truncated sampling.
        seed: Seed of sampling. The random state of the process is restored.

    Raises:
        UserError: The prompt is no Unicode, has no tokens, or has one that the model has no embedding for; or the model
            supports fewer tokens than it and the new ones together.
    """
    import transformers

    if repaired(prompt)[1]:
        raise UserError("the prompt has bytes that are not UTF-8, or NUL. Convert it: iconv -f latin1 -t utf-8 FILE.")
    # EOS would end the text before its continuation.
    ids = without_suffix(tokenizer(prompt, return_tensors="pt").input_ids, tokenizer).to(model.device)
    prefix = prefix_of(tokenizer)
    if prefix and ids[0, : 2 * len(prefix)].tolist() == 2 * prefix:
        ids = ids[:, len(prefix) :]  # the prompt spells BOS out, as chat templates do
    if not ids.numel():
        raise UserError("the prompt has no tokens. Give a longer one.")
    check_tokens(ids, vocabulary_of(model), "the model")
    longest = longest_sequence(model.config)
    if longest is not None and ids.shape[1] + max_new_tokens > longest:
        raise UserError(
            f"the prompt has {ids.shape[1]} tokens and max_new_tokens is {max_new_tokens}, and the model supports at "
            f"most {longest} tokens. Lower max_new_tokens, or shorten the prompt."
        )
    own: Any = model.generation_config
    end = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    settings = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0} if temperature > 0 else {}),
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end,
    )
    clock = _clock()
    devices = [model.device] if model.device.type != "cpu" else []
    with torch.inference_mode(), _neutral(model), torch.random.fork_rng(devices, device_type=model.device.type):
        torch.manual_seed(seed)
        started = time.perf_counter()
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            streamer=clock,
            logits_processor=[finite],
        )
    new = made[0, ids.shape[1] :]
    times = clock.times[1:]  # the first is that of the prompt
    return Continuation(
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=ids.shape[1],
        tokens=len(new),
        first_seconds=times[0] - started,
        next_seconds=times[-1] - times[0],
    )


def finite(ids: Tensor, scores: Tensor) -> Tensor:
    """Return ``scores``, the logits of the token after ``ids``: a logits processor of transformers.

    Raises:
        UserError: One is NaN, of which the most likely token would be the first of the vocabulary.
    """
    if bool(scores.isnan().any()):
        raise UserError(
            "the model's logits are not finite. Use another precision (--dtype float32), or check the weights."
        )
    return scores


@contextmanager
def _neutral(model: "PreTrainedModel") -> Iterator[None]:
    """Take the model's own settings of generation away, from which transformers fills in all that a call leaves out."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def bytes_in_memory(model: nn.Module) -> int:
    """Return the number of bytes of the parameters and buffers of ``model``, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _clock() -> Any:
    """Return a streamer of transformers that takes the time of each token."""
    from transformers.generation import BaseStreamer

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: object) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    return Clock()
