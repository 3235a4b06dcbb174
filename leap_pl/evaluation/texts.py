"""Texts to measure perplexity on: two standard ones by name, local files and hub datasets."""

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from leap_pl.base_model.prefix import Bos, prefix_of
from leap_pl.base_model.vocabulary import digest_of_vocabulary
from leap_pl.data.messages import for_options
from leap_pl.errors import UserError
from leap_pl.inputs.paths import expanded
from leap_pl.masks.mask_set import BEFORE, TRAINED

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


def check_held_out(name: str, config: Any) -> None:
    """Check that the runs recorded in a mask's ``config`` held out the same part of the local file ``name``.

    ``name`` may be a pattern. Which documents of a file are held out depends on its number in the list of files, of a
    text to calibrate on as of one to train on.

    Raises:
        UserError: A run was trained on the whole file, or held out other documents of it, or it is not known which. A
            file that no longer exists is compared by its name.
    """
    if not isinstance(config, dict):
        return
    before = config.get("mask")  # of a mask that stayed while weights learned
    if isinstance(before, dict):
        check_held_out(name, before.get("config"))
    training = config.get(TRAINED)
    of_start = training.get(BEFORE) if isinstance(training, dict) else None
    for text in of_start if isinstance(of_start, list) else ():
        check_held_out(name, {"data": text})
    check_held_out(name, config.get("weight_update"))  # of weights that a one-shot method updated under it
    data = config.get("data") or config  # a one-shot method records its text beside its settings
    if not isinstance(data, dict):
        return
    trained, whole = data.get("text"), data.get("validation_text") or data.get("held_out") is False
    names = [one for one in ([trained] if isinstance(trained, str) else trained or ()) if isinstance(one, str)]
    places = _places(names, data.get("files"))
    known = next((number for number, one in enumerate(places) if one.is_pattern), len(places))
    for number, file in enumerate(_files(name)):
        found = [place for place, one in enumerate(places) if one.may_be(file)]
        if found and whole:
            raise UserError(
                f"--share held_out: the run that made this mask held out no part of {Path(name).name}, so all of it "
                "was trained on. Measure on another text."
            )
        if not found or file.suffix.lower() == ".txt":  # whose last part is held out, whatever its number
            continue
        if found[0] >= known:
            raise UserError(
                f"--share held_out: the run that made this mask read {places[known].name}, and which of its files "
                f"{file.name} was is not known, nor which documents of it were held out. Measure on another text."
            )
        other = [place for place in found if place < known and place != number]
        if other:
            raise UserError(
                f"--share held_out: {file.name} was file {other[0] + 1} of {len(places)} of the text of the run that "
                "made this mask, which held out other documents of it than those of the file alone. Measure on another "
                "text."
            )


@dataclass(frozen=True)
class _Place:
    """A file of a run's text, or what is known of files that are not there.

    Attributes:
        file: The file, if it is there.
        name: Its name, or the pattern that it matched.
        is_pattern: Whether ``name`` is a pattern, of nobody knows how many files.
    """

    file: Path | None
    name: str
    is_pattern: bool = False

    def may_be(self, file: Path) -> bool:
        """Return whether ``file`` is this one, or has its name or pattern."""
        if self.file is not None:
            return file.samefile(self.file)
        return fnmatch(file.name, Path(self.name).name) if self.is_pattern else file.name == self.name


def _places(names: Sequence[str], recorded: Any) -> list[_Place]:
    """Return the files of a run's text in its order: of ``names``, and ``recorded`` where patterns match others now."""
    places: list[_Place] = []
    for name in names:
        pattern = glob.has_magic(name)
        # Whoever made the mask wrote it: no pattern of folders, which would be looked for on all disks.
        wide = pattern and glob.has_magic(str(Path(name).parent))
        there = [] if wide else [_Place(file, file.name) for file in _files(name)]
        places += there or [_Place(None, name if pattern else Path(name).name, pattern)]
    if isinstance(recorded, list) and recorded != [place.name for place in places]:
        return [_Place(None, str(name)) for name in recorded]
    return places


def _files(name: str) -> list[Path]:
    """Return the files that a file or pattern names, in the order in which a text has them."""
    if expanded(name).is_file():
        return [expanded(name)]
    return sorted(Path(found) for found in glob.glob(str(expanded(name)), recursive=True) if Path(found).is_file())  # noqa: PTH207


def tokens_digest(tokens: Tensor) -> str:
    """Return a digest of a tokenized text, 16 hexadecimal digits."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()[:16]


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return the size and digest of a tokenizer's vocabulary, which identify it wherever it was loaded from."""
    return {"vocabulary": len(tokenizer), "digest": digest_of_vocabulary(tokenizer)}
