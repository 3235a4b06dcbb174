"""Log-likelihoods of answers, with what several of them begin with computed once.

Legend of suffixes: B = rows, L = tokens of a row, N = scored tokens, D = hidden size, V = vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from leap_pl.base_model.backbone import Head, body_of, has_flash_attention, head_of
from leap_pl.base_model.vocabulary import vocabulary_of
from leap_pl.evaluation.perplexity import LOSS_ELEMENTS
from leap_pl.evaluation.prefix_rows import Answer, Row, arrange, batches

ROW_TOKENS = 512  # of a forward pass, for each unit of the batch size
PROBED = 16  # tokens of the prefix and of each branch of the probe, at most
# Largest error of a row against its sequences one by one, as a share of the error with a branch that sees the others.
# Rounding of bfloat16 makes .05 of it; a model that ignores the mask or the positions is at .9 or more.
PROBE_TOLERANCE = 0.25
UNLIMITED = 1 << 60


class SharedPrefixes:
    """Scores of answers by a causal language model, each common prefix read once."""

    def __init__(self, model: Any, head: Head) -> None:
        """Hold a causal language model, on its device, and its head."""
        self.model, self.head = model, head

    @classmethod
    def of(cls, model: Any) -> "SharedPrefixes | None":
        """Return the scores by ``model``; None if it cannot read rows, or its head is not known."""
        head = head_of(model)
        return None if head is None or not reads_rows(model) else cls(model, head)

    @torch.inference_mode()
    def score(self, answers: Sequence[Answer], batch_size: int) -> Iterator[tuple[Answer, float, bool]]:
        """Yield each of ``answers``, in another order, with its log-likelihood and whether it is the most likely one.

        Args:
            answers: What to score. Its inputs must not be longer than the model's positions. Those that are longer than
                its sliding windows share no row unless they are of the same inputs: a branch would have no window.
            batch_size: A forward pass reads up to this many times :data:`ROW_TOKENS` tokens, or one row.
        """
        budget, span = batch_size * ROW_TOKENS, attention_span(self.model)
        long = [answer for answer in answers if len(answer.inputs) > span]
        within = [answer for answer in answers if len(answer.inputs) <= span]
        arranged = (arrange(long, None), arrange(within, max(ROW_TOKENS, budget // 4)))
        for rows in chain.from_iterable(batches(rows, budget) for rows in arranged):
            hidden_BLD = row_states(self.model, rows)
            found = [(row, answer, places) for row, one in enumerate(rows) for answer, places in one.scored()]
            at_N = [(row, place) for row, _, places in found for place in places]
            wanted_N = [
                token for _, answer, _ in found for token in answer.tokens[len(answer.tokens) - answer.scored :]
            ]
            likely_N, first_N = self._log_likelihoods(hidden_BLD, at_N, wanted_N)
            begin = 0
            for _, answer, places in found:
                end = begin + len(places)
                yield answer, sum(likely_N[begin:end]), all(first_N[begin:end])
                begin = end

    def _log_likelihoods(
        self, hidden_BLD: Tensor, at: list[tuple[int, int]], wanted: list[int]
    ) -> tuple[list[float], list[bool]]:
        device = hidden_BLD.device
        rows_N, places_N = torch.tensor(at, device=device).unbind(1)
        wanted_N = torch.tensor(wanted, device=device)
        likely, first = [], []
        hidden_ND = hidden_BLD[rows_N, places_N]
        step = max(1, LOSS_ELEMENTS // vocabulary_of(self.model))
        for start in range(0, len(wanted), step):
            logits_NV = self.head(hidden_ND[start : start + step]).float()
            # A device_map may place the head on another device than the states.
            targets_N = wanted_N[start : start + step].to(logits_NV.device)
            likely.append(-nn.functional.cross_entropy(logits_NV, targets_N, reduction="none"))
            first.append(logits_NV.argmax(-1) == targets_N)
        return torch.cat(likely).cpu().double().tolist(), torch.cat(first).tolist()


def row_states(model: Any, rows: Sequence[Row]) -> Tensor:
    """Return the last hidden states (B, L, D) of ``rows``, padded to the longest.

    Each token attends to the prefix of its row and to its own branch, and has its position in its own sequence.
    """
    device = next(model.parameters()).device
    length = max(row.length for row in rows)
    tokens_BL = _padded((row.tokens() for row in rows), length, 0, device)
    # Without a branch, no mask, which has L² elements: the padding comes last.
    if all(row.length == row.shared for row in rows):
        states_BLD: Tensor = body_of(model)(input_ids=tokens_BL, use_cache=False).last_hidden_state
        return states_BLD
    positions_BL = _padded((row.positions() for row in rows), length, 0, device)
    branches_BL = _padded((row.branches() for row in rows), length, -1, device)
    own_BLL = branches_BL[:, :, None] == branches_BL[:, None, :]
    seen_BLL = (own_BLL | (branches_BL == 0)[:, None, :]).tril()
    return _states(model, tokens_BL, positions_BL, seen_BLL)


def reads_rows(model: Any) -> bool:
    """Return whether ``model`` can read rows: whether a row gives what its sequences give one by one.

    It is tried on the model itself: state-space layers, for example, have no attention mask, and not every
    implementation of attention takes one for each pair of tokens.
    """
    if "local" in (getattr(model.config.get_text_config(), "attention_layers", None) or ()):
        return False  # GPT-Neo: windows of its own, by the place in a row, that a short row does not show
    if has_flash_attention(model):
        return False  # it takes padding alone, and would read this mask as indices: on a GPU no later call works
    try:
        error, wrong = _probe(model)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    return error <= PROBE_TOLERANCE * wrong


def attention_span(model: Any) -> int:
    """Return the length of the longest sequence of which every layer of ``model`` attends to all earlier tokens."""
    text = model.config.get_text_config()
    limits = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((int(limit) for limit in limits if limit), default=UNLIMITED)


@torch.inference_mode()
def _probe(model: Any) -> tuple[float, float]:
    """Return the error of a row of two branches, and that of the same row where the second sees the first."""
    vocabulary, size = vocabulary_of(model), min(PROBED, attention_span(model) // 2)
    ids = [(7 + 131 * n) % vocabulary for n in range(3 * size + 1)]
    prefix, one, other = ids[:size], ids[size : 2 * size], ids[2 * size :]
    row = Row([Answer(0, (*prefix, *one, 0), 1), Answer(1, (*prefix, *other), 1)], size)
    device = next(model.parameters()).device
    alone_LD = body_of(model)(
        input_ids=torch.tensor([[*prefix, *other[:-1]]], device=device), use_cache=False
    ).last_hidden_state[0, size:]
    found_LD = row_states(model, [row])[0, 2 * size :]
    tokens_BL = torch.tensor([row.tokens()], device=device)
    places_BL = torch.arange(row.length, device=device)[None]
    seen_BLL = torch.ones(1, row.length, row.length, dtype=torch.bool, device=device).tril()
    wrong_LD = _states(model, tokens_BL, places_BL, seen_BLL)[0, 2 * size :]
    return float((found_LD - alone_LD).float().norm()), float((wrong_LD - alone_LD).float().norm())


def _states(model: Any, tokens_BL: Tensor, positions_BL: Tensor, seen_BLL: Tensor) -> Tensor:
    dtype = next(model.parameters()).dtype
    # Additive: eager attention adds it, and SDPA takes it as well as a boolean one.
    mask_B1LL = torch.zeros(seen_BLL.shape, dtype=dtype, device=seen_BLL.device)
    mask_B1LL = mask_B1LL.masked_fill_(~seen_BLL, torch.finfo(dtype).min)[:, None]
    states: Tensor = body_of(model)(
        input_ids=tokens_BL, position_ids=positions_BL, attention_mask=mask_B1LL, use_cache=False
    ).last_hidden_state
    return states


def _padded(lists: Iterable[list[int]], length: int, value: int, device: torch.device) -> Tensor:
    return torch.tensor([one + [value] * (length - len(one)) for one in lists], device=device)
