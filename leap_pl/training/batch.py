"""Token ids of a micro-batch, whatever loader it comes from."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leap_pl.base_model.sequence_length import longest_sequence
from leap_pl.base_model.vocabulary import vocabulary_of
from leap_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100  # label of a token that transformers' losses leave out


def input_ids_of(batch: Any) -> Tensor:
    """Return the tokens (B, L) of a micro-batch: a tensor, or the ``input_ids`` of a mapping, of which no more is used.

    A mapping with an ``attention_mask`` or ``labels`` is read for padding, which waits for the device that it is on;
    :class:`.TextDataModule` gives neither.

    Raises:
        UserError: It is something else, or has padding, or tokens that are not to be predicted: all would be learned.
    """
    if isinstance(batch, Tensor):
        return _whole_numbers(batch)
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise UserError(
            f"a micro-batch is a {type(batch).__name__}; give tokens, LongTensor (sequences, tokens), alone or as "
            "input_ids of a dictionary."
        )
    ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
    if not isinstance(ids, Tensor):
        raise UserError(
            f"input_ids of a micro-batch are a {type(ids).__name__}; give a LongTensor (sequences, tokens). A dataset "
            'of Hugging Face makes tensors with dataset.with_format("torch", columns=["input_ids"]).'
        )
    padded = isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point() and not bool(mask.all())
    if padded or (isinstance(labels, Tensor) and bool((labels == IGNORED).any())):
        raise UserError(
            "a micro-batch has padding (attention_mask 0, or labels -100), and every token would be learned from. Pack "
            "documents into sequences of equal length, as leap_pl.TextDataModule does; where labels hide end tokens "
            "alone, leave labels out."
        )
    return _whole_numbers(ids)


def _whole_numbers(ids: Tensor) -> Tensor:
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or ids.shape[1] < 2:
        raise UserError(
            f"a micro-batch is {str(ids.dtype).removeprefix('torch.')} of shape {tuple(ids.shape)}; give token ids, "
            "LongTensor (sequences, tokens), of two tokens or more."
        )
    return ids.long()


def check_length(ids: Tensor, model: "PreTrainedModel", name: str) -> None:
    """Check that ``model`` takes sequences as long as those of a micro-batch.

    Args:
        ids: Tokens (B, L).
        model: Base model.
        name: Its name, for the message.

    Raises:
        UserError: They are too long.
    """
    longest = longest_sequence(model.config)
    if longest is not None and ids.shape[1] > longest:
        raise UserError(
            f"a micro-batch has sequences of {ids.shape[1]} tokens, and {name} supports at most {longest}. Cut the "
            "text into shorter ones."
        )


def check_token_ids(ids: Tensor, model: "PreTrainedModel", name: str) -> None:
    """Check that ``model`` has an embedding for each token of a micro-batch; a GPU does not say which one is strange.

    Args:
        ids: Tokens (B, L), for whose device this waits.
        model: Base model.
        name: Its name, for the message.

    Raises:
        UserError: It has none for one of them.
    """
    rows = vocabulary_of(model)
    low, high = (int(number) for number in ids.aminmax())
    if low < 0 or high >= rows:
        raise UserError(
            f"a micro-batch has token {low if low < 0 else high}, and {name} has embeddings for 0 to {rows - 1}. Use "
            "the tokenizer of the model."
        )
