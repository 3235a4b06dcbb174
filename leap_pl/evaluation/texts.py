"""Texts to measure perplexity on: two standard ones by name, local files and hub datasets."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from leap_pl.base_model.prefix import Bos, prefix_of
from leap_pl.base_model.vocabulary import digest_of_vocabulary
from leap_pl.data.documents import warn
from leap_pl.data.held_out import splits_in
from leap_pl.data.messages import for_options
from leap_pl.errors import UserError, listing
from leap_pl.masks.trained_text import trained_files, trained_splits, why_not_held_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from leap_pl.data.documents import Share

# Of the options that messages on a text name, those that evaluate has.
OPTIONS = ("text_column", "config_name", "split")
C4_WINDOWS = 256  # windows of C4's validation split, from the first, in the standard protocol


@dataclass(frozen=True)
class HubText:
    """Split of a hub dataset that has a short name."""

    dataset: str
    config_name: str
    split: str
    windows: int | None = None  # number of windows to read; None for all


TEXTS = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": HubText("allenai/c4", "en", "validation", windows=C4_WINDOWS),
}


def check_text(name: str, *, text_column: str = "text", share: "Share" = "all") -> bool:
    """Check that ``name`` is a named text, an existing local file, or a possible hub id; return whether it is the last.

    Raises:
        UserError: If ``name`` is a path or pattern that matches no text file, or has no such ``share``.
    """
    if name not in TEXTS:
        from leap_pl.data.source import TextSource

        try:
            source = TextSource.open(name, text_column=text_column)
        except UserError as error:
            raise UserError(f"--perplexity {name}: {for_options(str(error), OPTIONS)}") from error
        if source.is_local:
            return False
    if share != "all":
        raise UserError(
            f"--perplexity {name}: a text from the hub has splits, and --share {share} is a part of local files. Leave "
            "--share out, or measure the local files apart."
        )
    return name not in TEXTS


def read_text(
    name: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seq_length: int,
    max_tokens: int | None,
    share: "Share",
    text_column: str = "text",
    config_name: str | None = None,
    split: str = "test",
    bos: Bos = "first",
) -> Tensor:
    """Return the tokens of the text ``name``: LongTensor[tokens].

    Args:
        name: ``wikitext2``, ``c4``, a local file, or a hub id.
        tokenizer: Tokenizer of the model.
        seq_length: Tokens in a window, with its prefix; of C4, 256 windows are read.
        max_tokens: Maximum number of tokens, from the first; None for all.
        share: Part of a local file to read: ``held_out``, which training leaves for validation, or ``all``.
        text_column: Column or JSON key of the text, except of ``wikitext2`` and ``c4``.
        config_name: Configuration of a hub id, except of these two.
        split: Split of a hub id, except of these two.
        bos: Windows that will begin with what the tokenizer puts before a text; with ``first`` the tokens begin with
            it.

    Raises:
        UserError: If the text cannot be found, fetched or read.
    """
    from leap_pl.data import held_out_tokens

    known = TEXTS.get(name)
    if known is None:
        try:
            return held_out_tokens(
                name,
                tokenizer,
                most=max_tokens,
                config_name=config_name,
                split=split,
                text_column=text_column,
                share=share,
                bos=bos,
            )
        except UserError as error:
            raise UserError(f"--perplexity {name}: {for_options(str(error), OPTIONS)}") from error
    in_window = seq_length - (len(prefix_of(tokenizer)) if bos == "every" else 0)
    limits = [n for n in (max_tokens, known.windows and known.windows * in_window) if n is not None]
    try:
        return held_out_tokens(
            known.dataset,
            tokenizer,
            most=min(limits, default=None),
            config_name=known.config_name,
            split=known.split,
            bos=bos,
        )
    except UserError as error:
        raise UserError(
            f"--perplexity {name} could not be read from the hub: {for_options(str(error), ())} If the hub is "
            "not reachable, give a local file: --perplexity FILE.jsonl (or .txt, .parquet)."
        ) from error


def check_trained(name: str, config: Any, *, share: "Share", config_name: str | None, split: str) -> None:
    """Check that the runs recorded in a mask's ``config`` were not trained on the text ``name`` that is measured.

    Of a text that is measured whole, which its user asked for, this is a warning.

    Args:
        name: ``wikitext2``, ``c4``, a local file or pattern, or a hub id.
        config: Settings in the mask's record, of any type.
        share: Part of a local text that is measured.
        config_name: Configuration of a hub id.
        split: Split of a hub id.

    Raises:
        UserError: With ``held_out``, a run was trained on it, or it is not known whether it was
            (:func:`leap_pl.masks.trained_text.why_not_held_out`).
    """
    local = [] if name in TEXTS else [name]
    reason = why_not_held_out(local, config)
    if share == "held_out":
        if reason:
            raise UserError(f"--share held_out: {reason}. Measure on another text.")
        return
    hub = TEXTS.get(name, HubText(name, config_name or "", split))
    splits = trained_splits(hub.dataset, hub.config_name or None, config)
    both = any({*one} & {*splits_in(hub.split)} for one in splits)
    files = trained_files(local, config)
    if files or both:
        part = " or add --share held_out for the part that was held out," if files and not reason else ""
        warn(
            f"--perplexity {name}: {listing(files, most=3) if files else 'this split'} was read to make the mask, so "
            f"that its perplexity does not show what the mask is on other text. Name another text,{part} to see that."
        )


def tokens_digest(tokens: Tensor) -> str:
    """Return a digest of a tokenized text, 16 hexadecimal digits."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()[:16]


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return the size and digest of a tokenizer's vocabulary, which identify it wherever it was loaded from."""
    return {"vocabulary": len(tokenizer), "digest": digest_of_vocabulary(tokenizer)}
