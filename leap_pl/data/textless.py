"""How long a text may go on without any text in it: a small file can unpack to gigabytes of nothing."""

from leap_pl.errors import UserError

MOST_RECORDS = 1_000_000  # lines or rows in a row that hold no text: a second or two of reading
MOST_BYTES = 1 << 30  # bytes in a row, after unpacking, that hold no text


class Textless:
    """Count what a reader has read since it last found text, and end what goes on for too long.

    Args:
        name: What the text is called in messages.
        unit: What it is made of: ``line`` or ``row``.
    """

    def __init__(self, name: str, unit: str) -> None:
        self.name = name
        self.unit = unit
        self._records = self._bytes = 0

    def found(self) -> None:
        """Begin to count anew: there was text."""
        self._records = self._bytes = 0

    def read(self, size: int = 0, *, records: int = 1, why: str = "") -> None:
        """Count ``records`` lines or rows of ``size`` bytes together, which held no text.

        Args:
            size: Bytes, after unpacking.
            records: How many lines or rows; 0 for a part of one.
            why: What was wrong with the first that was skipped, for the message.

        Raises:
            UserError: There were more than ``MOST_RECORDS`` or ``MOST_BYTES`` since the last text.
        """
        self._records += records
        self._bytes += size
        if self._records <= MOST_RECORDS and self._bytes <= MOST_BYTES:
            return
        if self._records > MOST_RECORDS:
            told = f"{MOST_RECORDS:,} {self.unit}s in a row hold no text"
        else:
            told = f"{MOST_BYTES:,} bytes in a row hold no text"
        raise UserError(f"{self.name}: {told}{f' ({why})' if why else ''}. Leave them out, or give another text.")
