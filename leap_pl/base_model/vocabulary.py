"""Check that a tokenizer matches a model: every token of a text must have a row in the model's embedding.

On a GPU a token without a row ends the process with a device-side assertion, which names neither token nor text.
"""

import hashlib
import json
from typing import TYPE_CHECKING, Any

from torch import Tensor

from leap_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_KINDS = (
    "The 1st of 12,345 tests: don't split  two   spaces\n\n\tor tabs.\r\n  def f(x_1):\n    return x ** 2 != -3.5e-7\n"
    "Ünïcödé naïve Straße ﬁ ½ — “quotes” Здравствуй, мир! 你好，世界。 こんにちは 안녕하세요 مرحبا नमस्ते 🙂👩‍💻 HTTP://a.b/c?d=E"
)


def vocabulary_of(model: "PreTrainedModel") -> int:
    """Return the number of tokens for which ``model`` has an embedding."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr, arg-type, operator, index, unused-ignore]


def digest_of_vocabulary(tokenizer: Any) -> str | None:
    """Return a digest of the tokens of ``tokenizer`` and their ids, 16 hexadecimal digits; None if it lists none."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()), default=repr)  # some are bytes
    return hashlib.sha256(tokens.encode()).hexdigest()[:16]


def digest_of_tokenization(tokenizer: Any) -> str:
    """Return a digest of the ids that ``tokenizer`` makes of a text of many kinds, 16 hexadecimal digits.

    Two tokenizers of one vocabulary may cut words, digits and white space in different ways.
    """
    tokens = json.dumps(
        [int(token) for token in tokenizer(_KINDS, add_special_tokens=False, verbose=False)["input_ids"]]
    )
    return hashlib.sha256(tokens.encode()).hexdigest()[:16]


def check_tokenizer(tokenizer: Any, vocabulary: int, name: str) -> None:
    """Check that the ids of ``tokenizer`` for ordinary text and its end token are below ``vocabulary``.

    Added tokens, such as one for padding, may have larger ids: they occur only in text that spells them out, which
    :func:`check_tokens` finds.

    Args:
        tokenizer: A transformers tokenizer.
        vocabulary: Number of tokens for which the model has an embedding.
        name: Name of the model, for the message.

    Raises:
        UserError: An id is too large.
    """
    added = set(tokenizer.get_added_vocab()) if hasattr(tokenizer, "get_added_vocab") else set()
    ordinary = [place for token, place in tokenizer.get_vocab().items() if token not in added]
    ends = [place for place in (tokenizer.eos_token_id, tokenizer.bos_token_id) if isinstance(place, int)]
    largest = max([*ordinary, *ends], default=0)
    if largest >= vocabulary:
        raise UserError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens, of ids up to {largest}, and the model has "
            f"embeddings for {vocabulary}. Put the tokenizer that belongs to the model into its folder."
        )


def check_tokens(tokens: Tensor, vocabulary: int, name: str) -> None:
    """Check that all of ``tokens``, a LongTensor of any shape, are below ``vocabulary``.

    Raises:
        UserError: A token is too large; the text spells out an added token, such as "<pad>".
    """
    largest = int(tokens.max()) if tokens.numel() else 0
    if largest >= vocabulary:
        raise UserError(
            f"the text contains token {largest}, which was added to the tokenizer, and {name} has embeddings for "
            f"{vocabulary}. Remove it from the text, or from the tokenizer's added tokens."
        )
