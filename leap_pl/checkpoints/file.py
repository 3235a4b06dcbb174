"""Checkpoint I/O for the Trainer: atomic, flushed writes, and reads that verify every bit."""

from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from leap_pl.checkpoints.layout import load_checkpoint
from leap_pl.checkpoints.states import check_states
from leap_pl.files import atomic_file


def write_archive(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    """Write ``checkpoint`` into an open file.

    Raises:
        OSError: If the disk is full, for example.
    """
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch reports its archive, not the full disk behind it
            raise error.__context__ from None
        raise


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoint I/O plugin that writes through :mod:`leap_pl.files` and reads by :mod:`leap_pl.checkpoints.layout`.

    The command line and, in any fit, the callback ``Checkpoints`` put it in the place of Lightning's own; else pass
    ``Trainer(plugins=[WholeCheckpointIO()])``. URLs such as ``s3://…`` are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path`` atomically.

        Raises:
            UserError: If the file cannot be written.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # Directly into the file: a copy in memory would double the memory that a large run needs.
        with atomic_file(path, own=True) as temporary, temporary.open("wb") as file:
            write_archive(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read ``path`` into CPU memory without running code from it.

        Raises:
            UserError: If ``path`` does not exist, is damaged, or is not a checkpoint.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, True)
        # Not memory-mapped: the optimizer keeps these tensors, and the file may be removed during the run.
        checkpoint = load_checkpoint(Path(path), mmap=False)
        check_states(checkpoint, str(path))
        return checkpoint


def write_whole(trainer: L.Trainer) -> None:
    """Let ``trainer`` write and read checkpoints by :class:`WholeCheckpointIO`, unless another plugin was chosen.

    Lightning's own moves a file from the folder for temporary files, and where that is on another disk, it writes
    through the link ``last.ckpt`` into the checkpoint that the link leads to.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpointIO()
