"""What is checked of the base model of a run, and said of it: its vocabulary and length, and weights that are 0."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from leap_pl.base_model.sequence_length import check_sequence_length
from leap_pl.base_model.vocabulary import check_tokenizer, vocabulary_of
from leap_pl.base_model.weights import MANY_ZEROS, Weight, share_of_zeros
from leap_pl.masks.mask_set import TRAINED
from leap_pl.training.datamodule import TextDataModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from leap_pl.masks import MaskSet


def check_data(data: Any, model: "PreTrainedModel", base_model: str) -> None:
    """Check that ``model`` takes the sequences and tokens of a data module, and tell that the vocabulary.

    Args:
        data: Data module of the run, of any class, or None.
        model: Base model.
        base_model: Its name, for messages.

    Raises:
        UserError: The sequences are too long, or the tokenizer is of another vocabulary.
    """
    asked = getattr(data, "seq_length", None)
    if asked:
        check_sequence_length(model.config, asked, base_model, "--data.seq_length")
    if isinstance(data, TextDataModule):  # what others call a vocabulary is theirs
        data.vocabulary = vocabulary_of(model)
        check_tokenizer(data.tokenizer, data.vocabulary, base_model)


def warn_if_sparse(weights: Mapping[str, Weight], base_model: str) -> None:
    """Warn of a mask that is learned of a model whose weights are 0 already, such as an exported one.

    Args:
        weights: Weights to gate.
        base_model: Name of the base model.
    """
    share = share_of_zeros(weights)
    if share > MANY_ZEROS:
        rank_zero_warn(
            f"base model {base_model} is sparse already: {share:.1%} of the gated weights are 0. Learning goes on with "
            "it. To prune the dense model, name that with --model.base_model."
        )


def warn_of_start(
    weights: Mapping[str, Weight], base_model: str, mask: "MaskSet | None", start: str | None, kind: str
) -> None:
    """Warn of weights that are trained under a fixed mask where they start from others than may be meant.

    Args:
        weights: Gated weights of the base model.
        base_model: Its name.
        mask: Fixed mask, on rank zero; None for a resumed run that did not find it.
        start: Folder of the weights that training starts from, if they are not the base model's.
        kind: What is trained of the weights; kept ones alone can start from others than the base model's.
    """
    if start is not None:
        return
    share = share_of_zeros(weights)
    trained = mask is not None and TRAINED in mask.provenance.config
    if share > MANY_ZEROS:
        rank_zero_warn(
            f"base model {base_model} is sparse already: {share:.1%} of the gated weights are 0. Distillation, if any, "
            "learns from it."
            + (
                " To learn from the dense model, name that with --model.base_model, and add --model.weights "
                f"{base_model}."
                if kind == "kept"
                else ""
            )
        )
    elif trained:
        rank_zero_warn(
            "the weights that this mask keeps were trained before, and this run starts from the base model's. To start "
            "from the trained ones, "
            + (
                "add --model.weights with the folder of the exported model."
                if kind == "kept"
                else "give the folder of the exported model as --model.base_model, from which distillation then learns."
            )
        )
