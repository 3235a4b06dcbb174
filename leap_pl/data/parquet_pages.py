"""Validate the footer and the page headers of a Parquet column before Arrow reads it.

A page header declares its unpacked size, and a dictionary its number of values; Arrow trusts both, and allocates the
memory in advance. A damaged footer can crash the process in Arrow, so it is parsed here first. Format:
https://github.com/apache/parquet-format, in Thrift's compact protocol.
"""

from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from leap_pl.errors import UserError

MOST_PAGE_BYTES = 1 << 30  # of one page of text, unpacked; writers aim at 1 MiB
MOST_DICTIONARY_BYTES = 1 << 28  # of a dictionary, unpacked; Arrow allocates 16 more bytes for each value
MOST_PAGES = 1 << 18  # in one column of one row group
MOST_FOOTER_BYTES = 1 << 24  # a footer for 10,000 row groups of ten columns has about ten million

_HEADER_BYTES = 1 << 12  # enough for most headers; one with long statistics has more
_MOST_HEADER_BYTES = 1 << 24
_DEEPEST = 16
_DICTIONARY_PAGE = 2
_LENGTH_PREFIX = 4  # bytes before each value of a dictionary


class Page(NamedTuple):
    """Header of a page."""

    kind: int
    unpacked: int  # bytes
    packed: int  # bytes after the header
    values: int


class Chunk(NamedTuple):
    """Part of a column in one row group."""

    rows: int
    start: int  # offset of its first page in the file
    length: int  # bytes


def check_footer(file: IO[bytes], name: str) -> int:
    """Return the bytes of the footer of the Parquet ``file``, called ``name`` in messages; 0 if it is no such file.

    Raises:
        UserError: It is longer than the file, or than ``MOST_FOOTER_BYTES``.
    """
    size = file.seek(0, 2)
    file.seek(max(size - 8, 0))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little") if tail[4:] == b"PAR1" else 0
    if length > size - 8 and length:
        raise _damaged(name, "its footer is longer than the file")
    if length > MOST_FOOTER_BYTES:
        raise UserError(
            f"{name} has a footer of {length:,} bytes; at most {MOST_FOOTER_BYTES:,} are read. Write it again with "
            "fewer row groups or columns."
        )
    return length


def chunks(file: IO[bytes], column: str, name: str) -> list[Chunk]:
    """Return the chunk of the top-level column ``column`` in each row group.

    Args:
        file: The Parquet file.
        column: Name of the column.
        name: Name of the file in messages.

    Raises:
        UserError: The footer is damaged, longer than ``MOST_FOOTER_BYTES``, or lacks the column.
    """
    length = check_footer(file, name)
    file.seek(max(file.seek(0, 2) - 8 - length, 0))
    try:
        groups = _Compact(file.read(length)).struct().get(4)
        if not isinstance(groups, list):
            raise TypeError
        return [_chunk(group, column.encode()) for group in groups]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, StopIteration) as error:
        raise _damaged(name, "its footer is invalid") from error


def _chunk(group: dict[int, Any], column: bytes) -> Chunk:
    """Return the chunk of a column in a row group; if the fields are invalid, any exception may be raised."""
    # In a column chunk, field 1 is the path of another file that contains it, and field 3 its metadata.
    metadata = next(chunk[3] for chunk in group[1] if chunk[3][3] == [column] and 1 not in chunk)
    starts = [metadata[9], *([metadata[11]] if metadata.get(11) else [])]  # of the data, and of the dictionary before
    if min(*starts, metadata[7], group[3]) < 0:
        raise ValueError
    return Chunk(rows=int(group[3]), start=min(starts), length=int(metadata[7]))


def largest_page(file: IO[bytes], chunk: Chunk, name: str) -> int:
    """Return the unpacked size of the largest page of a column chunk in bytes, an upper bound of its values' sizes.

    Args:
        file: The Parquet file.
        chunk: Part of a column of byte strings.
        name: Name of the file in messages.

    Raises:
        UserError: A page or a dictionary is too large to read, or declares impossible sizes.
    """
    largest = 0
    for number, page in enumerate(_pages(file, chunk, name)):
        largest = max(largest, page.unpacked)
        is_dictionary = page.kind == _DICTIONARY_PAGE
        most = MOST_DICTIONARY_BYTES if is_dictionary else MOST_PAGE_BYTES
        if page.unpacked > most:
            raise UserError(
                f"{name}: a {'dictionary' if is_dictionary else 'page'} of {page.unpacked:,} bytes is more than the "
                f"{most:,} that are read at once. Write it again with smaller pages, or as .jsonl.gz."
            )
        if is_dictionary and page.values > page.unpacked // _LENGTH_PREFIX:
            raise _damaged(name, f"a dictionary of {page.unpacked:,} bytes cannot hold {page.values:,} values")
        if number >= MOST_PAGES:
            raise _damaged(name, f"a row group has more than {MOST_PAGES:,} pages")
    return largest


def _pages(file: IO[bytes], chunk: Chunk, name: str) -> Iterator[Page]:
    start, end = chunk.start, chunk.start + chunk.length
    while start < end:
        page, length = _header(file, start, name)
        if min(page.unpacked, page.packed, page.values) < 0:
            raise _damaged(name, "a page has a negative size")
        yield page
        start += length + page.packed


def _header(file: IO[bytes], start: int, name: str) -> tuple[Page, int]:
    """Read the page header at byte ``start``; return the page and the length of the header in bytes."""
    size = _HEADER_BYTES
    while True:
        file.seek(start)
        raw = file.read(size)
        reader = _Compact(raw)
        try:
            fields = reader.struct()
            break
        except IndexError:
            if len(raw) < size or size >= _MOST_HEADER_BYTES:
                raise _damaged(name, "the header of a page is truncated") from None
            size *= 16
        except ValueError as error:
            raise _damaged(name, str(error)) from None
    detail: dict[int, Any] = next((fields[key] for key in (5, 7, 8) if isinstance(fields.get(key), dict)), {})
    numbers = [fields.get(1), fields.get(2), fields.get(3), detail.get(1, 0)]
    if not all(isinstance(number, int) for number in numbers):
        raise _damaged(name, "the header of a page lacks its sizes")
    return Page(*numbers), reader.at


def _damaged(name: str, reason: str) -> UserError:
    return UserError(f"{name} is not a valid Parquet file ({reason}). Fetch it again.")


class _Compact:
    """Reader of Thrift's compact protocol: structs of numbers, byte strings, lists and structs.

    Raises:
        IndexError: The bytes are truncated.
        ValueError: They are not such a struct.
    """

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.at = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Return the fields of a struct by number; None for fields of types that are not needed here."""
        fields: dict[int, Any] = {}
        number = 0
        while True:
            head = self._byte()
            if head == 0:
                return fields
            kind, step = head & 15, head >> 4
            number = number + step if step else self._zigzag()
            fields[number] = None if kind in (1, 2) else self._value(kind, depth)  # 1 and 2 are true and false

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError("its metadata is nested too deeply")
        if kind in (4, 5, 6):
            return self._zigzag()
        if kind == 12:
            return self.struct(depth + 1)
        if kind in (1, 2, 3):
            self._bytes(1)
        elif kind == 7:
            self._bytes(8)
        elif kind == 8:
            return self._bytes(self._varint())
        elif kind in (9, 10):
            head = self._byte()
            count = self._varint() if head >> 4 == 15 else head >> 4
            if count > len(self.raw):  # each takes at least a byte
                raise IndexError
            return [self._value(head & 15, depth + 1) for _ in range(count)]
        else:
            raise ValueError("its metadata is damaged")
        return None

    def _byte(self) -> int:
        byte = self.raw[self.at]
        self.at += 1
        return byte

    def _bytes(self, count: int) -> bytes:
        self.at += count
        if self.at > len(self.raw):
            raise IndexError
        return self.raw[self.at - count : self.at]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("its metadata is damaged")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
