"""lm-eval's model, whose requests that begin alike are computed once.

Importing this module imports lm-eval, which takes seconds.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from leap_pl.base_model.prefix import without_suffix
from leap_pl.base_model.vocabulary import check_tokens, vocabulary_of
from leap_pl.errors import UserError, warn_once
from leap_pl.evaluation.answers import SharedPrefixes
from leap_pl.evaluation.generation import finite
from leap_pl.evaluation.prefix_rows import Answer
from leap_pl.inputs.plain_values import shown

Request = tuple[tuple[str, str] | None, list[int], list[int]]


@contextmanager
def _tied_as_it_is(model: Any) -> Iterator[None]:
    """Keep ``tie_weights`` from replacing the head: lm-eval calls it as the config says, whatever the files held."""
    vars(model)["tie_weights"] = lambda *_, **__: None
    try:
        yield
    finally:
        del vars(model)["tie_weights"]


class PrefixSharingLM(HFLM):  # type: ignore[misc, unused-ignore]
    """``HFLM`` for a model in memory. Prompts, tokens and generation are lm-eval's.

    Log-likelihoods are in float32 from the model's last hidden states on; lm-eval's are in the model's data type. A
    question begins with ``prefix`` once, also if it is truncated, and so does the first window of a text; lm-eval
    truncates the prefix away, and puts it before that window twice.
    """

    def __init__(self, prefix: Sequence[int] = (), **settings: Any) -> None:
        """Take ``prefix``, the tokens that requests begin with, and the settings of ``HFLM``."""
        with _tied_as_it_is(settings["pretrained"]):
            super().__init__(add_bos_token=bool(prefix), softmax_dtype=torch.float32, **settings)
        self._prefix = list(prefix)
        self._rolling = False

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **_: Any) -> None:
        # lm-eval takes tokenizers of two classes alone, and that of mistral-common is of another.
        self.tokenizer = tokenizer

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        """Return the prefix and the tokens of ``string``, without what the tokenizer puts after a text, such as EOS.

        There is no prefix if they become windows, which lm-eval begins with one, or if ``string`` begins with it.
        """
        tokens: list[int] = super().tok_encode(string, bool(add_special_tokens), **more)
        if add_special_tokens is not None or self._rolling or tokens[: len(self._prefix)] == self._prefix:
            return tokens
        return self._prefix + tokens

    def tok_batch_encode(self, *strings: Any, **options: Any) -> Any:
        """Return tokens and attention mask of prompts to continue, likewise without what is put after a text.

        Raises:
            UserError: The model has no embedding for one of the tokens.
        """
        tokens, attention = super().tok_batch_encode(*strings, **options)
        most = options.get("left_truncate_len", strings[2] if len(strings) > 2 else None)
        truncated = tokens.shape[1] == most
        tokens = without_suffix(tokens, self.tokenizer) if self._prefix else tokens  # without a prefix, nothing is put
        attention = attention[:, : tokens.shape[1]]
        if self._prefix and truncated:  # from the left, the prefix first
            prefix = torch.tensor(self._prefix, dtype=tokens.dtype, device=tokens.device)[: tokens.shape[1]]
            tokens[attention.bool().all(1), : len(prefix)] = prefix
        check_tokens(tokens, vocabulary_of(self.model), "the model")
        return tokens, attention

    def loglikelihood_rolling(self, *requests: Any, **options: Any) -> list[float]:
        """Return the log-likelihood of each text, read in windows."""
        self._rolling = True
        try:
            found: list[float] = super().loglikelihood_rolling(*requests, **options)
        finally:
            self._rolling = False
        return found

    def _model_generate(self, *words: Any, **options: Any) -> Tensor:
        """Return the prompts and what the model continues them with.

        Raises:
            UserError: Its logits are not finite.
        """
        made: Tensor = super()._model_generate(*words, **options, logits_processor=[finite])
        return made

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        found = self._scored(requests, disable_tqdm, override_bs)
        bad = sum(math.isnan(likelihood) for likelihood, _ in found)
        if bad:  # of which lm-eval would take the first answer for the most likely
            raise UserError(
                f"the model's logits are not finite for {bad:,} of {len(found):,} answers. Evaluate in another "
                "precision (--dtype float32), or check the weights."
            )
        return found

    def _scored(self, requests: list[Request], disable_tqdm: bool, override_bs: int | None) -> list[tuple[float, bool]]:
        requests = [(text, self._truncated(context, answer), answer) for text, context, answer in requests]
        # What is longer than the model's positions is left to lm-eval, which says so.
        most = self.max_length
        self._check(requests)
        short = [n for n, (_, context, answer) in enumerate(requests) if len(context) + len(answer) - 1 <= most]
        scores = self._scores if short else None
        if scores is None:
            return self._one_by_one(requests, disable_tqdm, override_bs)
        # First the others: an answer that fits no model is an error.
        others = sorted({*range(len(requests))}.difference(short))
        alone = self._one_by_one([requests[n] for n in others], disable_tqdm, override_bs) if others else []
        found = dict(zip(others, alone, strict=True))
        answers = [Answer(n, (*requests[n][1], *requests[n][2]), len(requests[n][2])) for n in short]
        with tqdm(total=len(answers), desc="Answers", unit="answer", disable=disable_tqdm) as bar:
            for answer, likelihood, most_likely in scores.score(answers, override_bs or int(self.batch_size)):
                found[answer.index] = (likelihood, most_likely)
                bar.update()
        for n in short:
            if requests[n][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[n][0], found[n])
        return [found[n] for n in range(len(requests))]

    @cached_property
    def _scores(self) -> SharedPrefixes | None:
        """Scores by the model; None, with a warning, if it cannot read several answers at once."""
        scores = SharedPrefixes.of(self.model)
        if scores is None:
            warn_once(
                f"{type(self.model).__name__} cannot read several answers at once: each is scored alone, which takes "
                "longer."
            )
        return scores

    def _check(self, requests: list[Request]) -> None:
        """Check that questions and answers have tokens, and that the model has embeddings for these.

        Raises:
            UserError: One has not; lm-eval asserts the first without a message, and an answer without tokens would win.
        """
        for text, context, answer in requests:
            if not (context and answer):
                what = "question" if answer else "answer"
                raise UserError(f"a {what} of --tasks has no tokens: {shown(repr(text), 200)}. Choose other tasks.")
        largest = [max(*context, *answer) for _, context, answer in requests]
        check_tokens(torch.tensor(largest, device="cpu"), vocabulary_of(self.model), "the model")

    def _truncated(self, context: list[int], answer: list[int]) -> list[int]:
        """Return ``context`` without its earliest tokens but the prefix, so that it and ``answer`` fit the model."""
        excess = len(context) + len(answer) - 1 - self.max_length
        kept = len(self._prefix)
        # An answer that does not fit at all is an error, which lm-eval raises.
        if excess <= 0 or excess + max(kept, 1) > len(context) or context[:kept] != self._prefix:
            return context
        return self._prefix + context[kept + excess :]

    def _one_by_one(
        self, requests: list[Request], disable_tqdm: bool, override_bs: int | None
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        return found
