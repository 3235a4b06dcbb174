"""Read the text column of a Parquet file in batches that fit in memory, whatever sizes the file declares."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leap_pl.data.parquet_pages import check_footer, chunks, largest_page
from leap_pl.data.textless import OF_CHAT
from leap_pl.errors import UserError, listing
from leap_pl.inputs.plain_values import shown
from leap_pl.inputs.reading import open_regular

_BATCH_ROWS = 64
_BATCH_BYTES = 1 << 28  # upper bound of a batch, even if all its rows are as long as the longest one can be


def column_values(file: Path, column: str, start: int) -> Iterator[tuple[int, Any]]:
    """Yield the values of ``column`` from row ``start`` on, each with the number of its row.

    Raises:
        UserError: The column is missing, duplicate or not text; or the file is damaged, or has a page that is too
            large.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_regular(file) as handle:
            check_footer(handle, str(file))  # before Arrow reads it whole
        with open_regular(file) as handle, pq.ParquetFile(file) as table:
            _check_column(file, column, table.schema_arrow)
            row = 0
            for group, chunk in enumerate(chunks(handle, column, str(file))):
                if row + chunk.rows <= start:
                    row += chunk.rows
                    continue
                largest = largest_page(handle, chunk, str(file))
                rows = min(_BATCH_ROWS, max(1, _BATCH_BYTES // max(1, largest)))
                for batch in table.iter_batches(rows, row_groups=[group], columns=[column]):
                    values = batch.column(0)
                    if pa.types.is_dictionary(values.type):
                        values = values.dictionary_decode()
                    if not pa.types.is_null(values.type):
                        values = values.cast(pa.large_binary())  # so that invalid UTF-8 can be repaired
                    for value in values.to_pylist():
                        ordinal, row = row, row + 1
                        if ordinal >= start:
                            yield ordinal, value
    except UserError:
        raise
    except (pa.ArrowException, OSError, MemoryError, ValueError, OverflowError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} is not a valid Parquet file ({reason}). Fetch it again.") from error


def _check_column(file: Path, column: str, schema: Any) -> None:
    """Check that there is exactly one column of this name, and that it contains text."""
    import pyarrow as pa

    found = [field for field in schema if field.name == column]
    if not found:
        raise no_column(file, column, schema.names)
    kind = found[0].type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    of_text = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_null,
    )
    if len(found) > 1 or not any(is_text(kind) for is_text in of_text):
        what = f"{len(found)} times" if len(found) > 1 else f"with {shown(str(kind))}, not text"
        raise UserError(
            f"{file} has the column {column!r} {what}; it has: {listing([shown(name) for name in schema.names])}. "
            "Name the column of the text with --data.text_column." + OF_CHAT * pa.types.is_list(kind)
        )


def no_column(file: Path, column: str, columns: list[str]) -> UserError:
    """Return the error for a file that has ``columns`` but not the text ``column``."""
    return UserError(
        f"{file} has no column {column!r}; it has: {listing([shown(c) for c in columns])}. "
        "Name the column of the text with --data.text_column."
    )
