"""Token ids of a micro-batch, whatever loader it comes from."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from leap_pl.errors import UserError

IGNORED = -100  # label of a token that transformers' losses leave out


def input_ids_of(batch: Any) -> Tensor:
    """Return the tokens (B, L) of a micro-batch: a tensor, or the ``input_ids`` of a mapping.

    Raises:
        UserError: It is something else; or some of its tokens are padding, or not to be predicted, which learning does
            not know.
    """
    if isinstance(batch, Tensor):
        return batch
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise UserError(
            f"a micro-batch is a {type(batch).__name__}; give tokens, LongTensor (sequences, tokens), alone or as "
            "input_ids of a dictionary."
        )
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if (mask is not None and not bool(mask.all())) or (labels is not None and bool((labels == IGNORED).any())):
        raise UserError(
            "a micro-batch has padding (attention_mask 0, or labels -100), and every token would be learned from. Pack "
            "documents into sequences of equal length, as leap_pl.TextDataModule does."
        )
    ids: Tensor = batch["input_ids"]
    return ids
