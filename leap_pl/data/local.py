"""Read text from local files, JSON lines, Parquet and plain text, from any position and in bounded memory."""

import gzip
import json
import math
import os
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from leap_pl.data.documents import (
    EMPTY,
    HELD_OUT_ONE_IN,
    Defects,
    Document,
    Share,
    State,
    chained,
    decoded,
    digest_in,
    hashed,
    in_share,
    repaired,
)
from leap_pl.data.parquet import column_values, no_column
from leap_pl.data.textless import OF_CHAT, Textless
from leap_pl.errors import UserError, listing
from leap_pl.inputs.reading import check_regular, open_regular

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".txt")
TEXT_PART_BYTES = 1 << 18
LONGEST_LINE = 1 << 26  # bytes: a line is parsed as a whole, which may take thirty times as much memory
_BOM = b"\xef\xbb\xbf"

Documents = Generator[Document, None, str | None]
"""Generator of a file's documents that returns its digest."""


class LocalFiles:
    """Local files as the shards of a text.

    ``.jsonl``, ``.json`` (each also with ``.gz``): one JSON object a line, the text under ``text_column``.
    ``.parquet``: one document a row. ``.txt``: the whole file is one document, read in parts that are cut
    at line ends. Lines without a JSON object with a text are skipped, counted and reported; invalid UTF-8
    and NUL become U+FFFD.

    Whether a document is held out depends only on its place (file in the list, line or row), so it is the same in
    every run and for every seed. Of a ``.txt`` file the last twentieth is held out.

    Every state has a digest of the file before it, a SHA-256 chain (:func:`.documents.chained`) over the stored
    records, used or skipped: the decompressed lines of a JSON file, the values of a Parquet column, the parts of the
    share of a ``.txt`` file. So two files have the same digest only if all documents read from them are the same and in
    the same places; names and dates do not matter. :meth:`digest` does no parsing, and reads about 300 MB a second of
    lines of 2 kB on one CPU core.

    Args:
        files: Files, in the order that defines their shard numbers.
        text_column: Column or key of the text.
        share: Part of the text to read.
    """

    def __init__(self, files: Sequence[Path], text_column: str = "text", share: Share = "all") -> None:
        self.files = list(files)
        self.text_column = text_column
        self.share = share
        self.rereadable = True
        self.name = listing([str(file) for file in files], most=3)

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.files)

    def identity(self) -> str:
        """Return file names without folders, and sizes, for messages; :meth:`digest` compares the text itself."""
        named = [f"{file.name} ({_size_of(file)} bytes)" for file in self.files]
        if len(named) <= 8:
            return ", ".join(named)
        return f"{listing(named, most=8)} (digest {hashed(*map(zlib.crc32, map(os.fsencode, named))):016x})"

    def shard_name(self, shard: int) -> str:
        """Return the path of the file."""
        return str(self.files[shard])

    def digest(self, shard: int, until: State | None) -> str | None:
        """Read file ``shard`` up to the state ``until``, or to its end, and return its digest.

        If ``until`` is not the end of a document, or is after the end of the file, the digest does not match.

        Raises:
            UserError: The file cannot be read.
        """
        file = self.files[shard]
        records = {".txt": self._parts_of_text, ".parquet": self._rows}.get(file.suffix.lower(), _lines)
        end = math.inf if until is None else float(until["row"] if "row" in until else until.get("byte", 0))
        digest: str | None = ""
        with _reading(file):
            for place, record in records(file):
                if place >= end:
                    break
                digest = chained(digest, record)
        return EMPTY if until is None and digest == "" else digest

    def read(self, shard: int, state: State | None) -> Documents:
        """Yield the documents of file ``shard`` from ``state`` on, and return the file's digest.

        Raises:
            UserError: The file cannot be read, is damaged or truncated, has no ``text_column``, or contains no usable
                record.
        """
        file = self.files[shard]
        readers: dict[str, Callable[[int, Path, State], Documents]]
        readers = {".txt": self._read_text, ".parquet": self._read_parquet}
        reader = readers.get(file.suffix.lower(), self._read_json_lines)
        if check_regular(file) == 0 and file.suffix.lower() != ".parquet":
            return EMPTY
        with _reading(file):
            digest = yield from reader(shard, file, state or {})
        return EMPTY if digest == "" else digest

    def _read_json_lines(self, shard: int, file: Path, state: State) -> Documents:
        defects, digest = Defects(str(file), "line"), digest_in(state)
        line, byte = state.get("line", 0), state.get("byte", 0)
        none_good = line == 0  # of any share: a file is refused for what it is, not for one line
        textless = Textless(str(file), "line")
        with _opened(file) as handle:
            handle.seek(byte)
            while raw := handle.readline(LONGEST_LINE):
                ordinal, line, byte = line, line + 1, byte + len(raw)
                textless.read(why=defects.first_skipped)
                rest = _skip_rest(handle, raw, textless)
                byte += rest
                digest = chained(digest, _record(raw, rest))
                inside = in_share(self.share, shard, ordinal)
                if not inside and not none_good:
                    continue
                noted = defects if inside else Defects(str(file), "line", silent=True)
                if inside:
                    textless.read(len(raw), records=0, why=defects.first_skipped)
                if rest:
                    noted.note(ordinal, f"has more than {LONGEST_LINE:,} bytes", skipped=True)
                    continue
                raw = raw.removeprefix(_BOM) if ordinal == 0 else raw
                if ordinal == 0 and raw.strip() == b"[":
                    raise UserError(f"{file} is one JSON list. Write an object on each line: jq -c '.[]' FILE.")
                record = _parsed(raw, ordinal, noted)
                if record is None:
                    continue
                if self.text_column not in record:
                    if none_good:
                        raise no_column(file, self.text_column, list(record))
                    noted.note(ordinal, f"has no {self.text_column!r}", skipped=True)
                    continue
                text = self._checked(record[self.text_column], ordinal, noted)
                if text is None:
                    continue
                none_good = False
                if inside:
                    if text.strip():
                        textless.found()
                    yield Document(text, {"line": line, "byte": byte, "digest": digest})
        defects.total()
        if none_good and defects.skipped:
            chat = OF_CHAT * ("has list, not text" in defects.first_skipped)
            raise UserError(
                f"{file}: none of the {defects.skipped} lines read is a JSON object with a text; "
                f"{defects.first_skipped}. Give one object a line, such as {{{json.dumps(self.text_column)}: "
                f'"..."}}.{chat}'
            )
        return digest

    def _checked(self, value: Any, ordinal: int, defects: Defects) -> str | None:
        """Return the text of a record; None, reported, if its value is not a text."""
        if value is None:
            return ""
        if not isinstance(value, str | bytes):
            kind = f"has {type(value).__name__}, not text, under {self.text_column!r}"
            defects.note(ordinal, kind, skipped=True)
            return None
        text, was_repaired = decoded(value) if isinstance(value, bytes) else repaired(value)
        if was_repaired:
            defects.note(ordinal, "has NUL, invalid UTF-8 or lone surrogates", skipped=False)
        return text

    def _read_parquet(self, shard: int, file: Path, state: State) -> Documents:
        defects, digest = Defects(str(file), "row"), digest_in(state)
        textless = Textless(str(file), "row")
        for row, value in column_values(file, self.text_column, state.get("row", 0)):
            digest = chained(digest, _stored(value))
            textless.read()
            if in_share(self.share, shard, row):
                text = self._checked(value, row, defects)
                if text is not None:
                    if text.strip():
                        textless.found()
                    yield Document(text, {"row": row + 1, "digest": digest})
        defects.total()
        return digest

    def _rows(self, file: Path) -> Iterator[tuple[int, bytes]]:
        return ((row, _stored(value)) for row, value in column_values(file, self.text_column, 0))

    def _read_text(self, shard: int, file: Path, state: State) -> Documents:
        defects, digest = Defects(str(file), "part"), digest_in(state)
        with open_regular(file) as handle:
            if handle.read(2) in (BOM_UTF16_LE, BOM_UTF16_BE):
                raise UserError(f"{file} is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8.")
            first, last = _share_of_text(handle, file.stat().st_size, self.share)
            for byte, raw in _parts(file, handle, state.get("byte", first), last):
                digest, next_byte = chained(digest, raw), byte + len(raw)
                text, was_repaired = decoded(raw.removeprefix(_BOM) if byte == 0 else raw)
                if was_repaired:
                    ordinal = (byte - first) // TEXT_PART_BYTES
                    defects.note(ordinal, "has NUL or invalid UTF-8", f"from byte {byte} on", skipped=False)
                ends = next_byte >= last
                part = not (ends and byte == first)
                yield Document(text, {"byte": next_byte, "digest": digest}, part=part, ends=ends)
        defects.total()
        return digest

    def _parts_of_text(self, file: Path) -> Iterator[tuple[int, bytes]]:
        with open_regular(file) as handle:
            yield from _parts(file, handle, *_share_of_text(handle, file.stat().st_size, self.share))


def _parts(file: Path, handle: IO[bytes], byte: int, last: int) -> Iterator[tuple[int, bytes]]:
    """Yield the parts of a text file from ``byte`` to ``last``, each with the offset of its first byte."""
    while byte < last:
        handle.seek(byte)
        raw = handle.read(min(TEXT_PART_BYTES, last - byte))
        if not raw:
            raise UserError(f"{file} became shorter while being read. Run again when nothing writes to it.")
        if byte + len(raw) < last:
            raw = raw[: _cut(raw)]
        yield byte, raw
        byte += len(raw)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the records of a file of lines, each with the offset of its first byte."""
    byte = 0
    with _opened(file) as handle:
        while raw := handle.readline(LONGEST_LINE):
            rest = _skip_rest(handle, raw)
            yield byte, _record(raw, rest)
            byte += len(raw) + rest


def _record(raw: bytes, rest: int) -> bytes:
    """Return the bytes of a line that enter the digest; for a line that is too long, its beginning and length."""
    return raw if not rest else raw + f"and {rest} bytes".encode()


def _stored(value: Any) -> bytes:
    """Return the bytes of a Parquet value that enter the digest."""
    return value if isinstance(value, bytes) else repr(value).encode(errors="surrogatepass")


def _skip_rest(handle: IO[bytes], raw: bytes, textless: Textless | None = None) -> int:
    """Read to the end of a line that is too long; return the number of skipped bytes."""
    skipped = 0
    while len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
        raw = handle.readline(LONGEST_LINE)
        skipped += len(raw)
        if textless is not None:
            textless.read(len(raw), records=0, why=f"a line has more than {LONGEST_LINE:,} bytes")
    return skipped


def _parsed(raw: bytes, ordinal: int, defects: Defects) -> dict[str, Any] | None:
    """Return the JSON object in a line; None for an empty line and, reported, for a line without an object."""
    if not raw.strip():
        return None
    try:
        line = raw.decode()
    except UnicodeDecodeError:
        line = raw.decode(errors="replace")
        defects.note(ordinal, "has invalid UTF-8", skipped=False)
    try:
        record = json.loads(line, strict=False)  # strict would refuse raw control characters in a text
    except (ValueError, RecursionError) as error:
        defects.note(ordinal, "is not JSON", _first_line(error), skipped=True)
        return None
    if not isinstance(record, dict):
        defects.note(ordinal, "is not a JSON object", skipped=True)
        return None
    return record


def _opened(file: Path) -> IO[bytes]:
    handle = open_regular(file)
    if file.suffix.lower() != ".gz":
        return handle
    return cast(IO[bytes], _Unpacked(handle))


class _Unpacked(gzip.GzipFile):
    """Gzip file that closes its underlying file."""

    def __init__(self, packed: IO[bytes]) -> None:
        super().__init__(fileobj=packed, mode="rb")
        self.packed = packed

    def close(self) -> None:
        super().close()
        self.packed.close()


def _share_of_text(handle: IO[bytes], size: int, share: Share) -> tuple[int, int]:
    """Return the range of ``share`` in a text file of ``size`` bytes: its first byte, and the one after its last."""
    if share == "all":
        return 0, size
    border = size - size // HELD_OUT_ONE_IN
    handle.seek(border)
    # White space near the end of the file alone would leave next to nothing to validate on.
    border += _cut(handle.read(min(TEXT_PART_BYTES, size - border)), forward=True, most=(size - border) // 2)
    return (0, border) if share == "train" else (border, size)


def _cut(raw: bytes, *, forward: bool = False, most: int | None = None) -> int:
    """Return where to cut ``raw``: before its last (``forward``: first) line end, else a space, else a character.

    White space after the first ``most`` bytes does not count.

    Cutting before the white space leaves it to the word that follows, as tokenizers do.
    """
    for mark in (b"\n", b" "):
        at = raw.find(mark, 1, most) if forward else raw.rfind(mark, 1)
        if at > 0:
            return at
    at = 0 if forward else len(raw) - 1
    # Bytes 10xxxxxx continue a character; four of them in a row are not UTF-8, whatever the cut.
    while 0 <= at < len(raw) and raw[at] & 0xC0 == 0x80 and (at < 4 if forward else at > len(raw) - 4):
        at += 1 if forward else -1
    return at if forward else max(at, 1)


def _size_of(file: Path) -> int:
    with _reading(file):
        return file.stat().st_size


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file} is not a valid gzip file ({_first_line(error)}). Fetch it again.") from error
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror or _first_line(error)}). Check its path and permissions."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
