"""Limit how much a reader reads without finding text: a small file can unpack to gigabytes of nothing."""

from leap_pl.errors import UserError

MOST_RECORDS = 1_000_000  # consecutive lines or rows without text: a second or two of reading
MOST_BYTES = 1 << 30  # consecutive bytes, after unpacking, without text


OF_CHAT = " Write messages as one text first, by the tokenizer's chat template (docs/text.md)."
"""Remedy for values that are lists, as the column of chat data is."""


class Textless:
    """Counter of what a reader has read since it last found text, with a limit.

    Args:
        name: Name of the text in messages.
        unit: Unit of the text: ``line`` or ``row``.
    """

    def __init__(self, name: str, unit: str) -> None:
        self.name = name
        self.unit = unit
        self._records = self._bytes = 0

    def found(self) -> None:
        """Reset the count: there was text."""
        self._records = self._bytes = 0

    def read(self, size: int = 0, *, records: int = 1, why: str = "") -> None:
        """Count ``records`` lines or rows without text, ``size`` bytes in total.

        Args:
            size: Bytes, after unpacking.
            records: Number of lines or rows; 0 for a part of one.
            why: Reason why the first record was skipped, for the message.

        Raises:
            UserError: More than ``MOST_RECORDS`` or ``MOST_BYTES`` were read since the last text.
        """
        self._records += records
        self._bytes += size
        if self._records <= MOST_RECORDS and self._bytes <= MOST_BYTES:
            return
        if self._records > MOST_RECORDS:
            found = f"{MOST_RECORDS:,} consecutive {self.unit}s contain no text"
        else:
            found = f"{MOST_BYTES:,} consecutive bytes contain no text"
        raise UserError(f"{self.name}: {found}{f' ({why})' if why else ''}. Leave them out, or give another text.")
