"""Token ids of a micro-batch, whatever loader it comes from."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from leap_pl.errors import UserError

IGNORED = -100  # label of a token that transformers' losses leave out


def input_ids_of(batch: Any) -> Tensor:
    """Return the tokens (B, L) of a micro-batch: a tensor, or the ``input_ids`` of a mapping.

    A mapping with an ``attention_mask`` or ``labels`` is read for padding, which waits for the device that it is on;
    :class:`.TextDataModule` gives neither.

    Raises:
        UserError: It is something else, or has padding, or tokens that are not to be predicted: all would be learned.
    """
    if isinstance(batch, Tensor):
        return batch
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise UserError(
            f"a micro-batch is a {type(batch).__name__}; give tokens, LongTensor (sequences, tokens), alone or as "
            "input_ids of a dictionary."
        )
    ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
    padded = isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point() and not bool(mask.all())
    if padded or (isinstance(labels, Tensor) and bool((labels == IGNORED).any())):
        raise UserError(
            "a micro-batch has padding (attention_mask 0, or labels -100), and every token would be learned from. Pack "
            "documents into sequences of equal length, as leap_pl.TextDataModule does."
        )
    return cast(Tensor, ids)
