"""Whether a tokenizer goes with a model: every token that text becomes has a row in the model's embedding.

On a GPU a token without one ends the process with an assertion of the device, which names no token and no text.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from leap_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def vocabulary_of(model: "PreTrainedModel") -> int:
    """Return the number of tokens that ``model`` has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr, arg-type, operator, index, unused-ignore]


def check_tokenizer(tokenizer: Any, vocabulary: int, name: str) -> None:
    """Make sure that what ``tokenizer`` makes of ordinary text, and its end token, are among ``vocabulary`` tokens.

    Tokens that were added to it, such as one for padding, may lie behind: text has them only where it spells them
    out, and :func:`check_tokens` finds those.

    Args:
        tokenizer: A transformers tokenizer.
        vocabulary: Tokens that the model has an embedding for.
        name: Of the model, for the message.

    Raises:
        UserError: They are not.
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
    """Make sure that all of ``tokens``, a LongTensor of any shape, are among ``vocabulary`` ones.

    Raises:
        UserError: One is not; the text holds it spelled out, as it holds "<pad>".
    """
    largest = int(tokens.max()) if tokens.numel() else 0
    if largest >= vocabulary:
        raise UserError(
            f"the text holds token {largest}, which was added to the tokenizer, and {name} has embeddings for "
            f"{vocabulary}. Take it out of the text, or out of the tokenizer's added tokens."
        )
