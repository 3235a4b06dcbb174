"""Token ids of a micro-batch, whatever loader it comes from."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from leap_pl.errors import UserError

IGNORED = -100  # label of a token that transformers' losses leave out


def input_ids_of(batch: Any) -> Tensor:
    """Return the tokens (B, L) of a micro-batch: a tensor, or the ``input_ids`` of a mapping.

    Raises:
        UserError: It is something else.
    """
    if isinstance(batch, Tensor):
        return batch
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise UserError(
            f"a micro-batch is a {type(batch).__name__}; give tokens, LongTensor (sequences, tokens), alone or as "
            "input_ids of a dictionary."
        )
    ids: Tensor = batch["input_ids"]
    return ids


def check_batch(batch: Any) -> None:
    """Check that no token of a micro-batch on the CPU is padding, or not to be predicted: learning does not know them.

    Raises:
        UserError: One is.
    """
    if not isinstance(batch, Mapping):
        return
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    padded = isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point() and not bool(mask.all())
    if padded or (isinstance(labels, Tensor) and bool((labels == IGNORED).any())):
        raise UserError(
            "a micro-batch has padding (attention_mask 0, or labels -100), and every token would be learned from. Pack "
            "documents into sequences of equal length, as leap_pl.TextDataModule does."
        )
