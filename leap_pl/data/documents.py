"""What a reader of text hands on, and which documents are kept apart for validation."""

import hashlib
import warnings
from collections.abc import Generator, Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch.distributed as dist
from torch.utils.data import get_worker_info

State = dict[str, Any]
"""Where a reader stands: plain Python, small, and of a form that only the reader knows."""

Share = Literal["train", "held_out", "all"]
"""Part of a text: a fixed twentieth that training never sees, the rest, or everything."""

HELD_OUT_ONE_IN = 20


class Document(NamedTuple):
    """One document, or one part of a text that is too long to be held at once."""

    text: str
    after: State
    """From where the reader goes on behind this."""
    part: bool = False
    """Whether there is more of the same document before or behind this."""
    ends: bool = True
    """Whether the document ends here."""


class Shards(Protocol):
    """A text in one or several shards, each of which can be read from any place noted before."""

    name: str
    """What the text is called in messages."""
    share: Share
    """Which part of it is read."""
    rereadable: bool
    """Whether what was read can be read again, to compare it: :meth:`digest` does so."""

    def __len__(self) -> int:
        """The number of shards."""
        ...

    def read(self, shard: int, state: State | None) -> Generator[Document, None, str | None] | Iterator[Document]:
        """The documents of a shard in their own order, empty ones included, from ``state`` on.

        A generator that returns the digest of the whole shard (:func:`chained`), if it knows it. The digest of what
        comes before a state is the state's ``digest``.
        """
        ...

    def digest(self, shard: int, until: State | None) -> str | None:
        """What the digest of a shard is now, up to a state or to its end; None if it cannot be read again."""
        ...

    def shard_name(self, shard: int) -> str:
        """What a shard is called in messages."""
        ...

    def identity(self) -> str:
        """What must be the same for a position in this text to mean the same."""
        ...


def chained(digest: str | None, record: bytes) -> str | None:
    """Return the digest of a text and one more ``record``: SHA-256 of the digest so far and the record.

    A chain can be continued from its last link: a reader that starts amid a file need not read what comes before.
    The digest of no record is the empty string; what is not known (a checkpoint of an earlier version does not say
    it) stays None.
    """
    return None if digest is None else hashlib.sha256(digest.encode() + b"\n" + record).hexdigest()


def digest_in(state: State | None) -> str | None:
    """Return the digest of what comes before ``state``; None if the state does not say it."""
    found = state.get("digest") if state else ""
    return found if isinstance(found, str) else None


class Reading(Iterator[Document]):
    """What is read of a shard, and, behind its last document, what the reader returned.

    Attributes:
        digest: Of the whole shard, once it is read to its end; None before, or if the reader does not know it.
    """

    def __init__(self, documents: Iterator[Document]) -> None:
        """Take what :meth:`Shards.read` gave."""
        self._documents = iter(documents)
        self.digest: str | None = None

    def __next__(self) -> Document:
        """The next document."""
        try:
            return next(self._documents)
        except StopIteration as end:
            self.digest = end.value if isinstance(end.value, str) else None
            raise


def hashed(*parts: int) -> int:
    """A 64-bit number that depends on ``parts`` alone, on every machine and in every version."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def in_share(share: Share, shard: int, ordinal: int) -> bool:
    """Whether document ``ordinal`` of ``shard`` belongs to ``share``."""
    if share == "all":
        return True
    return (hashed(shard, ordinal) % HELD_OUT_ONE_IN == 0) == (share == "held_out")


def decoded(raw: bytes) -> tuple[str, bool]:
    """``raw`` as text, and whether it had to be mended: invalid UTF-8 and NUL become U+FFFD."""
    try:
        return mended(raw.decode())
    except UnicodeDecodeError:
        return mended(raw.decode(errors="replace"))[0], True


def mended(text: str) -> tuple[str, bool]:
    """``text`` without NUL characters and lone surrogates, which tokenizers refuse, and whether it had any."""
    whole = text.replace("\0", "\ufffd")
    if not whole.isascii():
        try:
            whole.encode()
        except UnicodeEncodeError:
            whole = whole.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole, whole != text


def warn(message: str) -> None:
    """Warn once for all readers: they walk the same text, so the first worker of rank zero speaks for all."""
    worker = get_worker_info()
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    if first and (worker is None or worker.id == 0):
        warnings.warn(message, stacklevel=2)


class Blemishes:
    """What is wrong with single records of a file: skipped or mended, counted, and said.

    The first of each kind is said at once, with its place, the number of them at the end of the file.
    """

    def __init__(self, file: str, unit: str) -> None:
        self.file = file
        self.unit = unit  # "line" or "row"
        self.first_skipped = ""
        self.skipped = 0
        self._counts: dict[str, int] = {}

    def note(self, ordinal: int, kind: str, detail: str = "", *, skipped: bool) -> None:
        """Record ``ordinal`` (from 0) is of ``kind``: left out, or mended and used."""
        what = f"{self.unit} {ordinal + 1} {kind}{f' ({detail})' if detail else ''}"
        if skipped:
            self.skipped += 1
            self.first_skipped = self.first_skipped or what
        if kind not in self._counts:
            warn(f"{self.file}: {what}; it is {'skipped' if skipped else 'replaced by U+FFFD'}.")
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def total(self) -> None:
        """Say how many there were, at the end of the file."""
        for kind, count in self._counts.items():
            if count > 1:
                warn(f"{self.file}: {count} {self.unit}s like this: {self.unit} {kind}.")
