"""Text to validate on: its blocks, their even division over ranks, and what of it is trained on too."""

from itertools import islice

from torch import Tensor

from leap_pl.data.documents import Shards, warn
from leap_pl.data.hub import HubDataset
from leap_pl.data.messages import for_validation
from leap_pl.data.packing import BlockStream, stacked
from leap_pl.data.source import TextSource
from leap_pl.errors import UserError, listing


def held_out_blocks(stream: BlockStream, most: int, remedy: str = "") -> Tensor:
    """Return the first blocks of one pass over a validation text, LongTensor[at most ``most``, seq_length].

    Args:
        stream: Stream of the validation text.
        most: Number of blocks; fewer are returned with a warning.
        remedy: Sentence on what to type if the text cannot be read.

    Raises:
        UserError: The text cannot be read.
    """
    try:
        blocks = [*islice(stream.blocks(repeat=False), most)]
    except UserError as error:
        sentences = (
            f"No validation text: {for_validation(str(error))}",
            remedy,
            "Or give another text with --data.validation_text, or disable validation with "
            "--data.validation_sequences 0.",
        )
        raise UserError(" ".join(filter(None, sentences))) from error
    if len(blocks) < most:
        warn(
            f"{stream.source.name}: the validation text makes {len(blocks)} blocks of {stream.seq_length} tokens, "
            f"fewer than the {most} of data.validation_sequences; validation uses all of them."
        )
    return stacked(blocks, stream.seq_length)


def evenly(blocks: Tensor, ranks: int) -> Tensor:
    """Return ``blocks`` without the remainder, so that each of ``ranks`` ranks has as many.

    Raises:
        UserError: There are fewer blocks than ranks.
    """
    even = len(blocks) // ranks * ranks
    if not even:
        raise UserError(
            f"The validation text makes {len(blocks)} blocks, fewer than the {ranks} ranks. Set "
            f"--data.validation_sequences to {ranks} or more, give more text with --data.validation_text, or lower "
            "--data.seq_length."
        )
    return blocks[:even]


def warn_of_remainder(blocks: Tensor, ranks: int) -> None:
    """Warn if :func:`evenly` leaves out some of ``blocks``."""
    if left := len(blocks) % ranks:
        warn(
            f"validation uses {len(blocks) - left} of {len(blocks)} blocks, as many on each of {ranks} ranks, so that "
            f"its perplexity is of less text than on one. For the same on both, set --data.validation_sequences to "
            f"{len(blocks) - left}."
        )


def warn_of_overlap(trained: TextSource, validated: TextSource) -> None:
    """Warn of files, or of the split of a hub dataset, that are both ``trained`` and ``validated`` on."""
    both = sorted(map(str, trained.files() & validated.files()))
    if _have_in_common(trained.shards, validated.shards):
        both = [trained.name]
    if both:
        warn(
            f"{listing(both, most=3)} is both trained and validated on, so that validation does not show what the mask "
            "is on other text. Leave it out of data.text, or leave data.validation_text out."
        )


def _have_in_common(trained: Shards, validated: Shards) -> bool:
    """Return whether two texts are of one hub dataset, and have rows in common."""
    if not (isinstance(trained, HubDataset) and isinstance(validated, HubDataset)):
        return False
    learned, read = splits_in(trained.split), splits_in(validated.split)
    if trained.dataset != validated.dataset or not ({*learned} & {*read} or "all" in (*learned, *read)):
        return False
    divided = learned == read and "all" not in (trained.share, validated.share)
    named = trained.config_name == validated.config_name
    return not divided and (named or trained.configuration() == validated.configuration())


def splits_in(split: str) -> list[str]:
    """Return the splits that ``split``, such as ``train+test``, joins, in the order in which they are read."""
    return [part.strip() for part in str(split).split("+")]  # of another type it is refused elsewhere


def check_splits(split: str, validation_split: str) -> None:
    """Check that no row of a hub dataset is both learned from and validated on; equal splits are divided.

    Raises:
        UserError: The splits have one in common, beside others.
    """
    learned, validated = splits_in(split), splits_in(validation_split)
    if learned == validated:
        return
    both = f"data.split {split} and data.validation_split {validation_split}"
    if "all" in {*learned, *validated}:  # which may also be the name of one
        warn(
            f"{both} may have rows in common. If so, name the same split for both, of which one document in twenty is "
            "held out."
        )
    elif {*learned} & {*validated}:
        raise UserError(
            f"{both} have rows in common, so that validation would be of text that was learned from. Name splits that "
            "have none, or for both the same, which holds out one document in twenty."
        )
