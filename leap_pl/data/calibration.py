"""Text outside training: blocks to calibrate one-shot pruners, and whole texts to evaluate on."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from leap_pl.base_model.prefix import Bos, prefix_of
from leap_pl.data.documents import Share
from leap_pl.data.packing import BlockStream, Separator, stacked
from leap_pl.data.source import TextSource
from leap_pl.errors import UserError

MOST_CHARACTERS = 1 << 28  # of a text that is tokenized at once, which takes about thirty bytes a character
_EDGE = 64  # tokens at the end that may change when more text follows


def calibration_blocks(
    text: str | Sequence[str],
    tokenizer: Any,
    *,
    seq_length: int,
    sequences: int,
    seed: int = 0,
    config_name: str | None = None,
    split: str = "train",
    text_column: str = "text",
    share: Share = "train",
    separator: Separator = "end_token",
    bos: Bos = "every",
) -> Tensor:
    """Return the first blocks of the stream that a run on ``text`` trains on.

    Args:
        text: Local files, patterns, or a hub id, as in :class:`leap_pl.TextDataModule`.
        tokenizer: Name of a base model, or a transformers tokenizer.
        seq_length: Tokens in a block.
        sequences: Number of blocks. A text that is too short for them repeats, with a warning.
        seed: Seed of the order of files or shards.
        config_name: Configuration of a hub dataset.
        split: Split of a hub dataset.
        text_column: Column or JSON key of the text.
        share: Part of local files; ``train`` leaves out the twentieth that a run without ``validation_text``
            validates on, ``all`` is the part that a run with ``validation_text`` trains on. A hub split is read whole,
            also where a run would hold out a share of it (``validation_split`` the same as ``split``).
        separator: Separator after each document, as in :class:`leap_pl.TextDataModule`.
        bos: Whether blocks begin with what the tokenizer puts before a text, as in :class:`leap_pl.TextDataModule`.

    Returns:
        LongTensor[sequences, seq_length].

    Raises:
        UserError: The text is not found, not readable, or too short for one block.
    """
    source = TextSource.open(
        text, config_name=config_name, split=split, text_column=text_column, share=share, seed=seed
    )
    stream = BlockStream(source, loaded_tokenizer(tokenizer), seq_length, separator, bos)
    return stacked([*islice(stream.blocks(), sequences)], seq_length)


def held_out_tokens(
    text: str | Sequence[str],
    tokenizer: Any,
    *,
    most: int | None = None,
    config_name: str | None = None,
    split: str = "test",
    text_column: str = "text",
    share: Share = "all",
    bos: Bos = "first",
) -> Tensor:
    """Return a text as one sequence of tokens, as perplexity is measured in the pruning literature.

    Documents, including empty ones, are joined by a blank line and tokenized at once.

    Args:
        text: Local files, patterns, or a hub id.
        tokenizer: Name of a base model, or a transformers tokenizer.
        most: Number of tokens from the beginning; None is all of them. Text after them is not read.
        config_name: Configuration of a hub dataset.
        split: Split of a hub dataset.
        text_column: Column or JSON key of the text.
        share: Part of local files; ``held_out`` is the part that a run without ``validation_text`` validates on.
        bos: ``first`` begins with what the tokenizer puts before a text (a token for Llama, nothing for GPT-2);
            ``every`` and ``none`` are the tokens of the text alone, to be cut into windows with a prefix or without.

    Returns:
        LongTensor[tokens].

    Raises:
        UserError: The text is not found, not readable, or empty.
    """
    source = TextSource.open(text, config_name=config_name, split=split, text_column=text_column, share=share)
    encode = loaded_tokenizer(tokenizer)
    prefix = prefix_of(encode) if bos == "first" else []
    parts = _joined(source)
    read = ""
    # Characters, doubled until they give enough tokens.
    enough = None if most is None else min(8 * most, MOST_CHARACTERS)
    while True:
        fresh: list[str] = []
        length = len(read)
        for part in parts:
            fresh.append(part)
            length += len(part)
            if enough is not None and length >= enough:
                break
            if length > MOST_CHARACTERS:
                raise _too_long(source, "Give a shorter text, or limit it to its beginning with --max_tokens.")
        read += "".join(fresh)
        tokens: list[int] = [*prefix, *encode(read, add_special_tokens=False, verbose=False)["input_ids"]]
        if enough is None or length < enough or len(tokens) > most + _EDGE:  # type: ignore[operator]
            break
        if enough == MOST_CHARACTERS and next(parts, None) is None:
            break
        if enough == MOST_CHARACTERS:
            raise _too_long(source, f"Lower --max_tokens below {len(tokens) - _EDGE:,}, or give a shorter text.")
        enough = min(2 * enough, MOST_CHARACTERS)
    if not read.strip():
        raise UserError(f"{source.name} contains no text. Give another text.")
    return torch.tensor(tokens[:most], device="cpu")


def _too_long(source: TextSource, remedy: str) -> UserError:
    return UserError(
        f"{source.name} has more than {MOST_CHARACTERS:,} characters, too many to tokenize at once. {remedy}"
    )


def _joined(source: TextSource) -> Iterator[str]:
    first, ends = True, True
    for shard in range(len(source.shards)):
        for document in source.shards.read(shard, None):
            if ends and not first:
                yield "\n\n"
            yield document.text
            first, ends = False, document.ends


def loaded_tokenizer(tokenizer: Any, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of the base model of that name; return any other object, a tokenizer, as it is.

    Args:
        tokenizer: Name of a base model, or a tokenizer.
        revision: Branch, tag or commit of the base model on the hub.
        trust_remote_code: Run code that comes with the tokenizer.
    """
    if not isinstance(tokenizer, str):
        return tokenizer
    from leap_pl.base_model.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer, revision=revision, trust_remote_code=trust_remote_code)
