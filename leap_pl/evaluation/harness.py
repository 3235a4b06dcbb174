"""lm-eval's model, whose requests that begin alike are computed once.

Importing this module imports lm-eval, which takes seconds.
"""

from lm_eval.models.huggingface import HFLM
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from leap_pl.errors import warn_once
from leap_pl.evaluation.answers import SharedPrefixes, attention_span
from leap_pl.evaluation.prefix_rows import Answer

Request = tuple[tuple[str, str] | None, list[int], list[int]]


class PrefixSharingLM(HFLM):  # type: ignore[misc, unused-ignore]
    """``HFLM`` for a model in memory. Prompts, tokens, truncation and generation are lm-eval's.

    Log-likelihoods are in float32 from the model's last hidden states on; lm-eval's are in the model's data type.
    """

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # What lm-eval must truncate, or what does not fit into a sliding window, is left to lm-eval.
        most = min(self.max_length, attention_span(self.model))
        short = [n for n, (_, context, answer) in enumerate(requests) if len(context) + len(answer) <= most]
        scores = SharedPrefixes.of(self.model) if short else None
        if scores is None:
            if short:
                warn_once(
                    f"{type(self.model).__name__} cannot read several answers at once: each is scored alone, which "
                    "takes longer."
                )
            return self._one_by_one(requests, disable_tqdm, override_bs)
        found: dict[int, tuple[float, bool]] = {}
        answers = [Answer(n, (*requests[n][1], *requests[n][2]), len(requests[n][2])) for n in short]
        batch_size = override_bs or int(self.batch_size)
        with tqdm(total=len(requests), desc="Answers", unit="answer", disable=disable_tqdm) as bar:
            for answer, likelihood, most_likely in scores.score(answers, batch_size):
                found[answer.index] = (likelihood, most_likely)
                bar.update()
        rest = [n for n in range(len(requests)) if n not in found]
        if rest:
            others = self._one_by_one([requests[n] for n in rest], disable_tqdm, override_bs)
            found.update(zip(rest, others, strict=True))
        for n in short:
            if requests[n][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[n][0], found[n])
        return [found[n] for n in range(len(requests))]

    def _one_by_one(
        self, requests: list[Request], disable_tqdm: bool, override_bs: int | None
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        return found
