"""The texts that perplexity is measured on: two of the field by name, and local files."""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from leap_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

C4_WINDOWS = 256  # of C4's validation split the field takes the first so many


@dataclass(frozen=True)
class HubText:
    """A split of a hub dataset that goes by a short name."""

    dataset: str
    config_name: str
    split: str
    windows: int | None = None  # how many windows of it are read; None is all


TEXTS = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": HubText("allenai/c4", "en", "validation", windows=C4_WINDOWS),
}


def check_text(name: str) -> None:
    """Make sure that ``name`` may be read: a named text, a local file that is there, or what may be a hub id.

    Raises:
        UserError: It is a path or a pattern, and nothing that is read as text is there.
    """
    if name in TEXTS:
        return
    from leap_pl.data.source import TextSource

    try:
        TextSource.open(name)
    except UserError as error:
        raise UserError(f"--perplexity {name}: {_in_flags_of_evaluate(str(error))}") from error


def read_text(
    name: str, tokenizer: "PreTrainedTokenizerBase", *, seq_length: int, max_tokens: int | None, share: str
) -> Tensor:
    """The tokens of the text ``name``: LongTensor[tokens].

    Args:
        name: ``wikitext2``, ``c4``, a local file, or a hub id.
        tokenizer: The model's.
        seq_length: Tokens in a window; C4 is read as far as 256 of them.
        max_tokens: The first so many tokens only; None is all.
        share: ``held_out`` takes of a local file the part that training leaves for validation, ``all`` all.

    Raises:
        UserError: The text cannot be found, fetched or read.
    """
    from leap_pl.data import held_out_tokens

    known = TEXTS.get(name)
    if known is None:
        try:
            return held_out_tokens(name, tokenizer, most=max_tokens, share=share)  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(f"--perplexity {name}: {_in_flags_of_evaluate(str(error))}") from error
    limits = [n for n in (max_tokens, known.windows and known.windows * seq_length) if n is not None]
    try:
        return held_out_tokens(
            known.dataset,
            tokenizer,
            most=min(limits, default=None),
            config_name=known.config_name,
            split=known.split,
        )
    except UserError as error:
        raise UserError(
            f"--perplexity {name} is read from the hub, and that failed: {_in_flags_of_evaluate(str(error))} "
            "Where the hub is out of reach, give a local file: --perplexity FILE.jsonl (or .txt, .parquet)."
        ) from error


def _in_flags_of_evaluate(message: str) -> str:
    """What the data says of a text, without the flags of fit that it ends with."""
    sentences = re.split(r"(?<=\.) ", message)
    told = " ".join(sentence for sentence in sentences if "--data." not in sentence)
    return told + (" The text is read from the column 'text'." if "--data.text_column" in message else "")


def tokens_digest(tokens: Tensor) -> str:
    """16 hexadecimal digits that tell one tokenized text from another."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()[:16]


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What tells one tokenizer from another, wherever it was loaded from."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "vocabulary": len(tokenizer),
        "digest": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
    }
