"""Text data: find, stream and pack text into blocks of tokens, and resume at the exact next block."""

from typing import Any

from leap_pl.data.calibration import calibration_blocks, held_out_tokens
from leap_pl.data.packing import BlockStream
from leap_pl.data.source import TextSource

__all__ = ["BlockStream", "TextSource", "calibration_blocks", "held_out_tokens"]


def __getattr__(name: str) -> Any:
    if name == "TextDataModule":  # where it used to be: configs name its class by this, and programs import it
        import leap_pl

        return leap_pl.TextDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
