"""Text in local files: JSON lines, Parquet and plain text, read from any position, never held whole."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from leap_pl.data.documents import (
    HELD_OUT_ONE_IN,
    Blemishes,
    Document,
    Share,
    State,
    decoded,
    hashed,
    in_share,
    mended,
)
from leap_pl.errors import UserError, listing

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".txt")
TEXT_PART_BYTES = 1 << 18
LONGEST_LINE = 1 << 28  # bytes: a line is held whole, and a file without line ends must not fill the memory
_BOM = b"\xef\xbb\xbf"


class LocalFiles:
    """Local files as the shards of a text.

    ``.jsonl``, ``.json`` (each also with ``.gz``): one JSON object a line, the text under ``text_column``.
    ``.parquet``: one document a row. ``.txt``: the whole file is one running text, read in parts and cut
    at line ends. Lines that are no JSON object with a text are skipped, counted and said; invalid UTF-8
    and NUL become U+FFFD.

    Which documents are held out follows from their place (file in the list, line or row) alone, so it is
    the same in every run and for every seed. Of a ``.txt`` file the last twentieth is held out.

    Args:
        files: The files, in the order that counts.
        text_column: Column or key of the text.
        share: Part of the text to read.
    """

    def __init__(self, files: Sequence[Path], text_column: str = "text", share: Share = "all") -> None:
        self.files = list(files)
        self.text_column = text_column
        self.share = share
        self.name = listing([str(file) for file in files], most=3)

    def __len__(self) -> int:
        """The number of files."""
        return len(self.files)

    def identity(self) -> str:
        """Names without folders, and sizes: a run goes on where its files were moved, not where they changed."""
        named = [f"{file.name} ({file.stat().st_size} bytes)" for file in self.files]
        if len(named) <= 8:
            return ", ".join(named)
        return f"{listing(named, most=8)} (digest {hashed(*map(zlib.crc32, map(str.encode, named))):016x})"

    def read(self, shard: int, state: State | None) -> Iterator[Document]:
        """The documents of file ``shard``, from ``state`` on.

        Raises:
            UserError: The file cannot be read, is corrupt or cut short, has no ``text_column``, or holds
                nothing that can be used.
        """
        file = self.files[shard]
        readers: dict[str, Callable[[int, Path, State], Iterator[Document]]]
        readers = {".txt": self._read_text, ".parquet": self._read_parquet}
        reader = readers.get(file.suffix.lower(), self._read_json_lines)
        with _reading(file):
            yield from reader(shard, file, state or {})

    def _read_json_lines(self, shard: int, file: Path, state: State) -> Iterator[Document]:
        blemishes = Blemishes(str(file), "line")
        line, byte = state.get("line", 0), state.get("byte", 0)
        from_start, used = line == 0, 0
        with _opened(file) as handle:
            handle.seek(byte)
            while raw := handle.readline(LONGEST_LINE):
                ordinal, line, byte = line, line + 1, byte + len(raw)
                rest = _skip_rest(handle, raw)
                byte += rest
                if not in_share(self.share, shard, ordinal):
                    continue
                if rest:
                    blemishes.note(ordinal, f"has more than {LONGEST_LINE:,} bytes", skipped=True)
                    continue
                record = _parsed(raw.removeprefix(_BOM) if ordinal == 0 else raw, ordinal, blemishes)
                if record is None:
                    continue
                if self.text_column not in record:
                    if from_start and not used:
                        raise self._no_column(file, list(record))
                    blemishes.note(ordinal, f"has no {self.text_column!r}", skipped=True)
                    continue
                text = self._checked(record[self.text_column], ordinal, blemishes)
                if text is not None:
                    used += 1
                    yield Document(text, {"line": line, "byte": byte})
        blemishes.total()
        if from_start and not used and blemishes.skipped:
            raise UserError(
                f"{file}: none of the {blemishes.skipped} lines read is a JSON object with a text; "
                f"{blemishes.first_skipped}. Give one object a line, such as {{{json.dumps(self.text_column)}: "
                '"..."}.'
            )

    def _checked(self, value: Any, ordinal: int, blemishes: Blemishes) -> str | None:
        """The text of a record; None where the record has something else in its place."""
        if value is None:
            return ""
        if not isinstance(value, str | bytes):
            kind = f"has {type(value).__name__} and no text under {self.text_column!r}"
            blemishes.note(ordinal, kind, skipped=True)
            return None
        text, was_mended = decoded(value) if isinstance(value, bytes) else mended(value)
        if was_mended:
            blemishes.note(ordinal, "holds NUL, invalid UTF-8 or lone surrogates", skipped=False)
        return text

    def _read_parquet(self, shard: int, file: Path, state: State) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        start = state.get("row", 0)
        blemishes = Blemishes(str(file), "row")
        try:
            with pq.ParquetFile(file) as table:
                if self.text_column not in table.schema_arrow.names:
                    raise self._no_column(file, table.schema_arrow.names)
                row = 0
                groups: list[int] = []
                for group in range(table.num_row_groups):
                    rows = table.metadata.row_group(group).num_rows
                    if row + rows > start or groups:
                        groups.append(group)
                    else:
                        row += rows
                batches = table.iter_batches(64, row_groups=groups, columns=[self.text_column])
                for batch in batches:
                    column = batch.column(0)
                    if pa.types.is_dictionary(column.type):
                        column = column.dictionary_decode()
                    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                        column = column.cast(pa.large_binary())  # so that invalid UTF-8 can be mended
                    for value in column.to_pylist():
                        ordinal, row = row, row + 1
                        if ordinal < start or not in_share(self.share, shard, ordinal):
                            continue
                        text = self._checked(value, ordinal, blemishes)
                        if text is not None:
                            yield Document(text, {"row": row})
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} is no intact Parquet file ({_first_line(error)}). Fetch it again.") from error
        blemishes.total()

    def _read_text(self, shard: int, file: Path, state: State) -> Iterator[Document]:
        blemishes = Blemishes(str(file), "part")
        with file.open("rb") as handle:
            first, last = _share_of_text(handle, file.stat().st_size, self.share)
            byte = state.get("byte", first)
            handle.seek(byte)
            while byte < last:
                raw = handle.read(min(TEXT_PART_BYTES, last - byte))
                if not raw:
                    raise UserError(f"{file} became shorter while it was read.")
                ends = byte + len(raw) >= last
                if not ends:
                    raw = raw[: _cut(raw)]
                text, was_mended = decoded(raw.removeprefix(_BOM) if byte == 0 else raw)
                if was_mended:
                    ordinal = (byte - first) // TEXT_PART_BYTES
                    blemishes.note(ordinal, "holds NUL or invalid UTF-8", f"from byte {byte} on", skipped=False)
                part = not (ends and byte == first)
                byte += len(raw)
                handle.seek(byte)
                yield Document(text, {"byte": byte}, part=part, ends=ends)
        blemishes.total()

    def _no_column(self, file: Path, columns: list[str]) -> UserError:
        return UserError(
            f"{file} has no column {self.text_column!r}; it has: {listing(columns)}. "
            "Name the one with the text with --data.text_column."
        )


def _skip_rest(handle: IO[bytes], raw: bytes) -> int:
    """Read on to the end of a line that is too long; how many bytes that were."""
    skipped = 0
    while len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
        raw = handle.readline(LONGEST_LINE)
        skipped += len(raw)
    return skipped


def _parsed(raw: bytes, ordinal: int, blemishes: Blemishes) -> dict[str, Any] | None:
    """The JSON object in a line; None for an empty line and, noted, for one that holds no object."""
    if not raw.strip():
        return None
    try:
        line = raw.decode()
    except UnicodeDecodeError:
        line = raw.decode(errors="replace")
        blemishes.note(ordinal, "holds invalid UTF-8", skipped=False)
    try:
        record = json.loads(line, strict=False)  # strict would refuse raw control characters in a text
    except (ValueError, RecursionError) as error:
        blemishes.note(ordinal, "is no JSON", _first_line(error), skipped=True)
        return None
    if not isinstance(record, dict):
        blemishes.note(ordinal, "is no JSON object", skipped=True)
        return None
    return record


def _opened(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file, "rb")) if file.suffix.lower() == ".gz" else file.open("rb")


def _share_of_text(handle: IO[bytes], size: int, share: Share) -> tuple[int, int]:
    """First byte of ``share`` in a text file of ``size`` bytes, and the byte behind its last."""
    if share == "all":
        return 0, size
    border = size - size // HELD_OUT_ONE_IN
    handle.seek(border)
    border += _cut(handle.read(min(TEXT_PART_BYTES, size - border)), forward=True)
    return (0, border) if share == "train" else (border, size)


def _cut(raw: bytes, *, forward: bool = False) -> int:
    """Where to cut ``raw``: before its last (``forward``: first) line end, else before a space, else a character.

    A cut before the white space and not behind it leaves the space to the word that follows, as tokenizers do.
    """
    for mark in (b"\n", b" "):
        at = raw.find(mark, 1) if forward else raw.rfind(mark, 1)
        if at > 0:
            return at
    at = 0 if forward else len(raw) - 1
    # Bytes 10xxxxxx continue a character; four of them in a row are no UTF-8, whatever the cut.
    while 0 <= at < len(raw) and raw[at] & 0xC0 == 0x80 and (at < 4 if forward else at > len(raw) - 4):
        at += 1 if forward else -1
    return at if forward else max(at, 1)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file} is no intact gzip file ({_first_line(error)}). Fetch it again.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or _first_line(error)}).") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
