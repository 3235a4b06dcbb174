"""Find a text on disk or on the hub, and read it pass after pass in a deterministic order."""

import glob
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from leap_pl.data.documents import Document, Reading, Shards, Share, State, digest_in, hashed, warn
from leap_pl.data.hub import HubDataset
from leap_pl.data.local import SUFFIXES, LocalFiles
from leap_pl.errors import UserError, listing
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.reading import check_regular
from leap_pl.inputs.register import note_input

MOST_TRIED = 1000  # files whose first documents are read before a run
MOST_RECORDED = 1000  # files that a record lists
# With a slash: a bare word such as text or json makes datasets read all files under the working directory.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OTHER_FILES = (".csv", ".tsv", ".zip", ".gz", ".zst", ".bz2", ".xz", ".arrow", ".md", ".html", ".xml", ".pdf")


class Place(NamedTuple):
    """Position of the beginning of a document: pass over the text, index of the shard in its order, reader's state.

    ``digests`` has, for each shard number, the digest if the shard was read to its end: None if it was not, and the
    empty string if it was and the digest is unknown.
    """

    number: int  # of the pass, from 0
    turn: int  # number of shards of the pass before this one
    state: State | None
    digests: tuple[str | None, ...] = ()


class Here(NamedTuple):
    """Beginning of a document that is being read: as :class:`Place`, with what was read to its end since the last one.

    Digests of all shards would be as many for each document as a text has files.
    """

    number: int
    turn: int
    state: State | None
    ended: tuple[tuple[int, str], ...] = ()  # number and digest of each shard that ended since the document before


class TextSource:
    """Text that can be read from any earlier place, for any number of passes.

    Every pass reads the shards (files, or the shards of a hub dataset) one after the other in an order that depends
    only on ``(seed, pass)``; within a shard the documents keep their order. There is no shuffle buffer, since none can
    be resumed exactly, and text like C4 is shuffled already. A text in one file is therefore read in its own order.

    Args:
        shards: Local files or a hub dataset.
        seed: Seed of the order; None keeps the order in which the shards were given.
    """

    def __init__(self, shards: Shards, seed: int | None = None) -> None:
        self.shards = shards
        self.seed = seed

    @property
    def name(self) -> str:
        """Return the name of the text in messages."""
        return self.shards.name

    def check_files(self) -> None:
        """Read the first document of each file: one that cannot be read would end a run in its middle.

        Of text that is not local nothing is read, and of many files the first :data:`MOST_TRIED`.

        Raises:
            UserError: A file cannot be read, or lacks the column.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is warned of when the file is read
            for shard in range(min(len(self.shards), MOST_TRIED) if self.is_local else 0):
                next(iter(self.shards.read(shard, None)), None)

    @property
    def is_local(self) -> bool:
        """Return whether the text is local files."""
        return isinstance(self.shards, LocalFiles)

    def files(self) -> set[Path]:
        """Return the real paths of the files of a local text; none for one from the hub."""
        return {file.resolve() for file in self.shards.files} if isinstance(self.shards, LocalFiles) else set()

    def record_of_files(self, text: str | Sequence[str]) -> dict[str, list[str]]:
        """Return what a record of ``text`` needs beside its name: ``files``, the names of those that patterns matched.

        Which documents of a file are held out depends on its number among them. Empty where the names are those of
        ``text`` itself, and for more files than a record should list.
        """
        names = [text] if isinstance(text, str | os.PathLike) else text
        named = not any(glob.has_magic(name) and not expanded(name).is_file() for name in map(os.fspath, names))
        if named or not isinstance(self.shards, LocalFiles) or len(self.shards) > MOST_RECORDED:
            return {}
        return {"files": [file.name for file in self.shards.files]}

    @classmethod
    def open(
        cls,
        text: str | Sequence[str],
        *,
        config_name: str | None = None,
        split: str = "train",
        text_column: str = "text",
        share: Share = "all",
        divide_split: bool = False,
        seed: int | None = None,
    ) -> "TextSource":
        """Find ``text``: local files, patterns such as ``shards/*.jsonl.gz``, lists of both, or one hub id.

        Args:
            text: File, pattern, list of these, or hub id.
            config_name: Configuration of a hub dataset.
            split: Split of a hub dataset.
            text_column: Column or JSON key of the text.
            share: Part of local files to read.
            divide_split: Apply ``share`` to a split of a hub dataset as well. By default such a split is read as a
                whole, since most datasets have a split for validation.
            seed: Seed of the order of the shards; None keeps the given order.

        Raises:
            UserError: A file does not exist or is of an unknown type, or hub ids and files are mixed.
        """
        names = [os.fspath(name) for name in ([text] if isinstance(text, str | os.PathLike) else text)]
        if not names:
            raise UserError("The list of text files is empty. Name at least one, such as --data.text FILE.jsonl.")
        if "" in names:
            raise UserError("The name of a text is empty. Name a file, such as --data.text FILE.jsonl, or a hub id.")
        files = [file for name in names for file in _local_files(name)]
        if files:
            others = [name for name in names if not _local_files(name)]
            if others:
                raise UserError(
                    f"There is no file {others[0]!r}, and hub ids cannot be listed with local files. Correct the name."
                )
            counts = Counter(file.resolve() for file in files if file.suffix.lower() != ".txt")  # cut by position
            twice = [file for file, count in counts.items() if count > 1]
            if twice and share != "all":  # text is held out by the number of its file
                raise UserError(
                    f"{listing(list(map(str, twice)), most=3)} is named twice in the text: its held-out part would be "
                    "trained on. Name each file once. Or give validation text of its own: --data.validation_text FILE."
                )
            return cls(LocalFiles(files, text_column, share), seed)
        if len(names) > 1:
            raise UserError(f"No file of this list exists: {', '.join(names)}. Name files, or a single hub id.")
        return cls(HubDataset(names[0], config_name, split, text_column, share if divide_split else "all"), seed)

    def documents(self, start: Place | None = None, *, repeat: bool = True) -> Iterator[tuple[Here, Document]]:
        """Yield the documents that are not empty, each with the place where it begins, from ``start`` on.

        Args:
            start: Place from an earlier reading of the same text with the same seed; None is the beginning.
            repeat: Continue with another pass after the last document, forever.

        Raises:
            UserError: The text cannot be read, or a whole pass has no document.
        """
        number, turn, state, before = start or Place(0, 0, None)
        digests: list[str | None] = [*before] or [None] * len(self.shards)
        ended: list[tuple[int, str]] = []
        found = start is not None  # a pass that was entered midway may have no document left
        while True:
            order = self._order(number)
            for at in range(turn, len(order)):
                here = state
                reading = Reading(self.shards.read(order[at], state))
                for document in reading:
                    if document.part or document.text.strip():
                        found = True
                        yield Here(number, at, here, tuple(ended)), document
                        ended.clear()
                    here = document.after
                state = None
                ended.append((order[at], self._note_digest(digests, order[at], reading.digest)))
            if not found:
                raise UserError(f"{self.name} contains no text in the part that is read.")
            if not repeat:
                return
            number, turn, found = number + 1, 0, False

    def _note_digest(self, digests: list[str | None], shard: int, digest: str | None) -> str:
        """Set the digest of a shard that was read to its end, and return it."""
        if digests[shard] and digest and digests[shard] != digest:
            warn(f"{self.shards.shard_name(shard)} has changed since the run first read it; it is read as it is now.")
        digests[shard] = digest or ""
        return digest or ""

    def check_unchanged(self, place: Place) -> None:
        """Check that the text before ``place`` is unchanged since the run read it.

        Files are read again up to the place, each once, however many passes the run has made. Text after the place,
        names, folders and dates do not matter: the run would have reached this place with the current files too.

        Raises:
            UserError: A file cannot be read, or the part of it that was read has changed.
        """
        for shard, digest in enumerate(place.digests):
            if digest and self.shards.digest(shard, None) not in (None, digest):
                raise self.changed(shard, "all of which was read")
        shard, digest = self.shard_at(place), digest_in(place.state)
        if not digest or any(place.digests[shard : shard + 1]):  # the beginning of a shard that is compared whole
            return
        if self.shards.digest(shard, place.state) not in (None, digest):
            raise self.changed(shard, f"whose beginning was read, as far as {_in_words(place.state)}")

    def with_digests(self, place: Place) -> Place:
        """Return ``place`` with the digests of the current text; those of a hub dataset stay unknown.

        Raises:
            UserError: A file cannot be read.
        """
        order, read = self._order(place.number), set(range(len(self.shards)))
        if place.number == 0:
            read = set(order[: place.turn])
        digests = tuple((self.shards.digest(s, None) or "") if s in read else None for s in range(len(self.shards)))
        state = place.state
        if state is not None and self.shards.rereadable:
            state = {**state, "digest": self.shards.digest(self.shard_at(place), state)}
        return place._replace(state=state, digests=digests)

    def shard_at(self, place: Place) -> int:
        """Return the number of the shard that contains ``place``."""
        order = self._order(place.number)
        return order[min(place.turn, len(order) - 1)]

    def changed(self, shard: int, what: str) -> UserError:
        """Return the error for a shard that has changed since the run read it."""
        return UserError(
            f"{self.shards.shard_name(shard)}, {what}, has changed since the run was stopped. Restore it as "
            "it was, or start a new run without --ckpt_path."
        )

    def _order(self, number: int) -> list[int]:
        shards = list(range(len(self.shards)))
        if self.seed is None:
            return shards
        seed = self.seed
        return sorted(shards, key=lambda shard: hashed(seed, number, shard))


def _in_words(state: State | None) -> str:
    """Return the place in a shard in words."""
    return next((f"{key} {state[key]:,}" for key in ("line", "row", "byte") if state and key in state), "its beginning")


def _local_files(name: str) -> list[Path]:
    """Return the files that ``name`` matches; none if it looks like a hub id.

    Raises:
        UserError: It is a path or a pattern that matches nothing, or a file that cannot be read as text.
    """
    path = expanded(name)
    try:
        path.exists()
    except (OSError, ValueError) as error:  # too long, or contains NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name[:80]!r} cannot be the name of a text ({reason}).") from error
    if path.is_dir():
        raise UserError(f"{name} is a folder. Name the files in it, such as {name.rstrip('/')}/*.jsonl.")
    if path.exists():
        return [_known(path)]
    if glob.has_magic(name):
        found = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())  # noqa: PTH207
        if not found:
            # In YAML a * begins an alias, so that such a list is no list.
            quoted = " In a list, put a pattern that begins with * in quotes: '[\"*.jsonl\", notes.txt]'."
            raise UserError(
                f"No file matches {name}. Give a pattern that matches {', '.join(SUFFIXES)} files."
                + quoted * name.startswith("[")
            )
        return [_known(file) for file in found]
    if not _HUB_ID.fullmatch(name) or name.lower().endswith(SUFFIXES + _OTHER_FILES):
        several = " Several files are a list: '[a.jsonl, b.jsonl]'." if "," in name else ""
        raise UserError(f"There is no file {name}. Name one that exists, or a hub dataset such as allenai/c4.{several}")
    return []


def _known(file: Path) -> Path:
    if not file.name.lower().endswith(SUFFIXES):
        raise UserError(f"{file}: files of this type cannot be read as text. Give {', '.join(SUFFIXES)}.")
    note_input(file)
    check_regular(file)
    return file
