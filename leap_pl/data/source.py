"""A named text: found on disk or on the hub, and read pass after pass in a known order."""

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from leap_pl.data.documents import Document, Reading, Shards, Share, State, digest_in, hashed, warn
from leap_pl.data.hub import HubDataset
from leap_pl.data.local import SUFFIXES, LocalFiles
from leap_pl.errors import UserError
from leap_pl.inputs.reading import check_regular
from leap_pl.inputs.register import note_input

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_OTHER_FILES = (".csv", ".tsv", ".zip", ".gz", ".zst", ".bz2", ".xz", ".arrow", ".md", ".html", ".xml", ".pdf")


class Place(NamedTuple):
    """Where a document begins: the pass over the text, the shard's place in its order, the reader's state.

    ``digests`` has the digest of each shard, by its number, that was read to its end: None where it was not, and the
    empty string where it was and the digest is not known.
    """

    number: int  # of the pass, from 0
    turn: int  # how many shards of the pass come before
    state: State | None
    digests: tuple[str | None, ...] = ()


class TextSource:
    """A text that can be read from any place noted before, as often as it takes.

    Every pass reads the shards (files, or the shards of a hub dataset) one after the other in an order
    that follows from ``(seed, pass)`` alone; within a shard the documents keep their order. There is no
    shuffle buffer, since nothing can resume one exactly, and none is needed for text like C4, which is
    shuffled already. A text in one file is therefore read in its own order.

    Args:
        shards: Local files or a hub dataset.
        seed: Of the order; None keeps the order in which the shards were named.
    """

    def __init__(self, shards: Shards, seed: int | None = None) -> None:
        self.shards = shards
        self.seed = seed

    @property
    def name(self) -> str:
        """What the text is called in messages."""
        return self.shards.name

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
            text: What to read.
            config_name: Configuration of a hub dataset.
            split: Split of a hub dataset.
            text_column: Column or JSON key of the text.
            share: Part of local files to read.
            divide_split: Whether ``share`` holds for a split of a hub dataset too, which is read whole otherwise,
                since most have a split for validation.
            seed: Of the order of the shards; None keeps it.

        Raises:
            UserError: There is no such file, or its kind is not known, or hub ids and files are mixed.
        """
        names = [text] if isinstance(text, str) else list(text)
        if not names:
            raise UserError("The list of text files is empty. Name at least one, such as --data.text FILE.jsonl.")
        files = [file for name in names for file in _local_files(name)]
        if files:
            strangers = [name for name in names if not _local_files(name)]
            if strangers:
                raise UserError(f"There is no file {strangers[0]!r}, and hub ids cannot be listed with local files.")
            return cls(LocalFiles(files, text_column, share), seed)
        if len(names) > 1:
            raise UserError(f"No file of this list is there: {', '.join(names)}. Name files, or one hub id alone.")
        return cls(HubDataset(names[0], config_name, split, text_column, share if divide_split else "all"), seed)

    def documents(self, start: Place | None = None, *, repeat: bool = True) -> Iterator[tuple[Place, Document]]:
        """The documents that are not empty, each with the place where it begins, from ``start`` on.

        Args:
            start: A place from an earlier reading of the same text with the same seed; None is the beginning.
            repeat: Go on with another pass after the last document, without end.

        Raises:
            UserError: The text cannot be read, or a whole pass holds no document.
        """
        number, turn, state, digests = start or Place(0, 0, None)
        digests = digests or (None,) * len(self.shards)
        found = start is not None  # a pass that was entered midway may be over
        while True:
            order = self._order(number)
            for at in range(turn, len(order)):
                here = Place(number, at, state, digests)
                reading = Reading(self.shards.read(order[at], state))
                for document in reading:
                    if document.part or document.text.strip():
                        found = True
                        yield here, document
                    here = Place(number, at, document.after, digests)
                state = None
                digests = self._with_digest(digests, order[at], reading.digest)
            if not found:
                raise UserError(f"{self.name} holds no text in the part that is read.")
            if not repeat:
                return
            number, turn, found = number + 1, 0, False

    def _with_digest(self, digests: tuple[str | None, ...], shard: int, digest: str | None) -> tuple[str | None, ...]:
        if digests[shard] and digest and digests[shard] != digest:
            warn(f"{self.shards.shard_name(shard)} has changed since the run read it first; it is read as it is now.")
        return (*digests[:shard], digest or "", *digests[shard + 1 :])

    def check_unchanged(self, place: Place) -> None:
        """Make sure that what was read before ``place`` is what the same reading would find now.

        Files are read again up to the place, each once, however many passes the run has made. What lies behind it,
        names, folders and dates do not matter: the run would have come to this place with the files as they are now.

        Raises:
            UserError: A file cannot be read, or what was read of it is another text now.
        """
        for shard, digest in enumerate(place.digests):
            if digest and self.shards.digest(shard, None) not in (None, digest):
                raise self.changed(shard, "all of which was read")
        shard, digest = self.shard_at(place), digest_in(place.state)
        if not digest or any(place.digests[shard : shard + 1]):  # the beginning of a shard that is compared whole
            return
        if self.shards.digest(shard, place.state) not in (None, digest):
            raise self.changed(shard, f"whose beginning was read, as far as {_told(place.state)}")

    def with_digests(self, place: Place) -> Place:
        """Add to ``place`` the digests that it does not say, of the text as it is now; of a hub dataset none.

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
        """The number of the shard in which ``place`` lies."""
        order = self._order(place.number)
        return order[min(place.turn, len(order) - 1)]

    def changed(self, shard: int, what: str) -> UserError:
        """What to say of a shard that is no longer the one that a run has read."""
        return UserError(
            f"{self.shards.shard_name(shard)}, {what}, holds another text now than when the run was stopped. Put it "
            "back as it was, or start a new run without --ckpt_path."
        )

    def _order(self, number: int) -> list[int]:
        shards = list(range(len(self.shards)))
        if self.seed is None:
            return shards
        seed = self.seed
        return sorted(shards, key=lambda shard: hashed(seed, number, shard))


def _told(state: State | None) -> str:
    """The place in a shard, in words."""
    known = {"line": "line", "row": "row", "byte": "byte"}
    return next((f"{known[key]} {state[key]:,}" for key in known if state and key in state), "its beginning")


def _local_files(name: str) -> list[Path]:
    """The files that ``name`` stands for; none where it looks like a hub id.

    Raises:
        UserError: It is a path or a pattern, and nothing is there, or something that cannot be read as text.
    """
    path = Path(name).expanduser()
    try:
        path.exists()
    except (OSError, ValueError) as error:  # too long, or with NUL in it
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name[:80]!r} cannot be the name of a text ({reason}).") from error
    if path.is_dir():
        raise UserError(f"{name} is a folder. Name the files in it, such as {name.rstrip('/')}/*.jsonl.")
    if path.exists():
        return [_known(path)]
    if glob.has_magic(name):
        found = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())  # noqa: PTH207
        if not found:
            raise UserError(f"No file matches {name}. Give a pattern that matches {', '.join(SUFFIXES)} files.")
        return [_known(file) for file in found]
    if not _HUB_ID.fullmatch(name) or name.lower().endswith(SUFFIXES + _OTHER_FILES):
        raise UserError(f"There is no file {name}. Name one that is there, or a hub dataset such as allenai/c4.")
    return []


def _known(file: Path) -> Path:
    if not file.name.lower().endswith(SUFFIXES):
        raise UserError(f"{file}: files of this kind cannot be read as text. Give {', '.join(SUFFIXES)}.")
    note_input(file)
    check_regular(file)
    return file
