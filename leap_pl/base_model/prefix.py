"""Prefix of a sequence: what the model's own tokenizer puts before a text, such as BOS, and which sequences have it.

Pretraining has put it before every text, and many models compute little that is useful without it. It is an input of
the model and never predicted.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

# `every`: every sequence begins with the prefix. `first`: only the first window of a text that is read from its
# beginning, as in the literature; blocks that are cut from packed documents have none. `none`: no sequence.
Bos = Literal["every", "first", "none"]

PROBE = "aA0"  # of which every vocabulary encodes something
_WORDS = {"every": "each beginning with BOS", "first": "the first beginning with BOS", "none": "without BOS"}


def prefix_of(tokenizer: Any) -> list[int]:
    """Return the tokens that ``tokenizer`` puts before a text: BOS for Llama and Gemma, none for Qwen and GPT-2."""
    return _around(tokenizer)[0]


def without_suffix(tokens_BT: "Tensor", tokenizer: Any) -> "Tensor":
    """Return texts as ``tokenizer`` encodes them without the tokens that it puts after a text: EOS for some.

    Args:
        tokens_BT: Tokens of B texts, padded on the left if at all.
        tokenizer: Tokenizer that has encoded them.
    """
    suffix = _around(tokenizer)[1]
    ended = bool(suffix) and all(row[-len(suffix) :].tolist() == suffix for row in tokens_BT)
    return tokens_BT[:, : -len(suffix)] if ended else tokens_BT


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    encoded = [tokenizer(PROBE, add_special_tokens=special, verbose=False) for special in (True, False)]
    whole, plain = ([*one["input_ids"]] for one in encoded)
    places = range(len(whole) - len(plain) + 1)
    at = next((at for at in places if whole[at : at + len(plain)] == plain), None)
    return ([], []) if at is None else (whole[:at], whole[at + len(plain) :])


def record_of(bos: Bos, tokenizer: Any) -> dict[str, str]:
    """Return the entry ``bos`` of a record; empty if the tokenizer puts nothing before a text, so that none differs."""
    return {"bos": bos} if prefix_of(tokenizer) else {}


def in_words(record: Mapping[str, Any]) -> list[str]:
    """Return what the entry ``bos`` of a ``record`` says of its sequences, for a list of words; empty without one."""
    words = _WORDS.get(str(record.get("bos")))
    return [] if words is None else [words]
