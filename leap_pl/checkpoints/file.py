"""How the trainer's checkpoints get to the disk and back: whole, flushed, and with every bit checked."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from leap_pl.checkpoints.layout import load_checkpoint
from leap_pl.checkpoints.states import check_states
from leap_pl.files import atomic_file


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written through :mod:`leap_pl.files` and read by :mod:`leap_pl.checkpoints.layout`.

    The trainer of the command line has it; another one takes ``Trainer(plugins=[WholeCheckpointIO()])``.
    Addresses such as ``s3://…`` are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path`` whole or not at all.

        Raises:
            UserError: It cannot be written.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # Straight into the file: a copy in memory would double what a large run needs.
        with atomic_file(path, own=True) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # torch tells of its own archive, and not of the full disk
                    raise error.__context__ from None
                raise

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read ``path`` into CPU memory without running anything in it.

        Raises:
            UserError: It is not there, damaged, or no checkpoint.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, True)
        # Not mapped: the optimizer goes on with these very tensors, and the file may be removed meanwhile.
        checkpoint = load_checkpoint(Path(path), mmap=False)
        check_states(checkpoint, str(path))
        return checkpoint
