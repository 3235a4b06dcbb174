"""Documents and shards of a text: the interface of its readers, digests, and the share held out for validation."""

import hashlib
import warnings
from collections.abc import Generator, Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch.distributed as dist
from torch.utils.data import get_worker_info

State = dict[str, Any]
"""Position of a reader: small, plain Python, in a form private to the reader."""

Share = Literal["train", "held_out", "all"]
"""Part of a text: ``held_out`` is a fixed twentieth that training never sees, ``train`` the rest."""

HELD_OUT_ONE_IN = 20


class Document(NamedTuple):
    """Document, or part of a document that is too long for memory."""

    text: str
    after: State
    """State from which the reader resumes after this document or part."""
    part: bool = False
    """Whether this is only a part of its document."""
    ends: bool = True
    """Whether the document ends here."""


class Shards(Protocol):
    """Text in one or more shards, each of which can be read from any earlier state."""

    name: str
    """Name of the text in messages."""
    share: Share
    """Part of the text that is read."""
    rereadable: bool
    """Whether :meth:`digest` can read the text again, to compare it."""

    def __len__(self) -> int:
        """Return the number of shards."""
        ...

    def read(self, shard: int, state: State | None) -> Generator[Document, None, str | None] | Iterator[Document]:
        """Yield the documents of a shard in their own order, including empty ones, from ``state`` on.

        A generator returns the digest of the whole shard (:func:`chained`), if known. The ``digest`` in a state covers
        everything before it.
        """
        ...

    def digest(self, shard: int, until: State | None) -> str | None:
        """Recompute the digest of a shard up to a state or to its end; None if it cannot be read again."""
        ...

    def shard_name(self, shard: int) -> str:
        """Return the name of a shard for messages."""
        ...

    def identity(self) -> str:
        """Return the identity of the text: positions are valid only in a text of the same identity."""
        ...


def chained(digest: str | None, record: bytes) -> str | None:
    """Return the digest of a text extended by one ``record``: SHA-256 of the previous digest and the record.

    A chain can be continued from its last digest: a reader that starts in the middle of a file need not read what comes
    before. The digest of zero records is the empty string; an unknown digest (as in checkpoints of earlier versions)
    stays None.
    """
    return None if digest is None else hashlib.sha256(digest.encode() + b"\n" + record).hexdigest()


EMPTY = chained("", b"")  # digest of a shard without a record, read to its end: "" means that it is not known


def digest_in(state: State | None) -> str | None:
    """Return the digest of everything before ``state``; None if the state has none."""
    found = state.get("digest") if state else ""
    return found if isinstance(found, str) else None


class Reading(Iterator[Document]):
    """Iterator over the documents of a shard that keeps the return value of the reader.

    Attributes:
        digest: Digest of the whole shard, once it is read to its end; None before, or if the reader does not know it.
    """

    def __init__(self, documents: Iterator[Document]) -> None:
        """Wrap the result of :meth:`Shards.read`."""
        self._documents = iter(documents)
        self.digest: str | None = None

    def __next__(self) -> Document:
        """Return the next document."""
        try:
            return next(self._documents)
        except StopIteration as end:
            self.digest = end.value if isinstance(end.value, str) else None
            raise


def hashed(*parts: int) -> int:
    """Hash ``parts`` to a 64-bit number, the same on every machine and in every version."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def in_share(share: Share, shard: int, ordinal: int) -> bool:
    """Return whether document ``ordinal`` of ``shard`` belongs to ``share``."""
    if share == "all":
        return True
    return (hashed(shard, ordinal) % HELD_OUT_ONE_IN == 0) == (share == "held_out")


def decoded(raw: bytes) -> tuple[str, bool]:
    """Decode ``raw``, replacing invalid UTF-8 and NUL by U+FFFD; return the text and whether anything was replaced."""
    try:
        return repaired(raw.decode())
    except UnicodeDecodeError:
        return repaired(raw.decode(errors="replace"))[0], True


def repaired(text: str) -> tuple[str, bool]:
    """Replace NUL and lone surrogates, which tokenizers refuse, by U+FFFD; return the text and whether it had any."""
    whole = text.replace("\0", "\ufffd")
    if not whole.isascii():
        try:
            whole.encode()
        except UnicodeEncodeError:
            whole = whole.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole, whole != text


def warn(message: str) -> None:
    """Warn once for all readers: they read the same text, so only the first worker of rank zero warns."""
    worker = get_worker_info()
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    if first and (worker is None or worker.id == 0):
        warnings.warn(message, stacklevel=2)


class Defects:
    """Counter of the invalid records of a file, which are skipped or repaired.

    The first of each kind is reported at once, with its position; their number is reported at the end of the file.
    With ``silent`` nothing is reported: the records are of a share that is not read.
    """

    def __init__(self, file: str, unit: str, *, silent: bool = False) -> None:
        self.file = file
        self.silent = silent
        self.unit = unit  # "line" or "row"
        self.first_skipped = ""
        self.skipped = 0
        self._counts: dict[str, int] = {}

    def note(self, ordinal: int, kind: str, detail: str = "", *, skipped: bool) -> None:
        """Count record ``ordinal`` (from 0) as one of ``kind``: skipped, or repaired and used."""
        what = f"{self.unit} {ordinal + 1} {kind}{f' ({detail})' if detail else ''}"
        if skipped:
            self.skipped += 1
            self.first_skipped = self.first_skipped or what
        if kind not in self._counts and not self.silent:
            warn(f"{self.file}: {what}; it is {'skipped' if skipped else 'replaced by U+FFFD'}.")
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def total(self) -> None:
        """Report the number of records of each kind, at the end of the file."""
        for kind, count in self._counts.items():
            if count > 1:
                warn(f"{self.file}: {count} {self.unit}s like this: {self.unit} {kind}.")
