"""Text data: find, stream and pack text into blocks of tokens, and resume at the exact next block."""

from leap_pl.data.calibration import calibration_blocks, held_out_tokens
from leap_pl.data.datamodule import TextDataModule
from leap_pl.data.packing import BlockStream
from leap_pl.data.source import TextSource

__all__ = ["BlockStream", "TextDataModule", "TextSource", "calibration_blocks", "held_out_tokens"]
