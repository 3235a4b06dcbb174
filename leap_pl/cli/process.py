"""Settings of the process that runs a verb of the trainer: what is warned of and logged, and matrix products."""

import errno
import logging
import threading
import warnings

import torch
from lightning.pytorch.utilities import rank_zero_only

# What the logger and the saved config meet in a folder that cannot be written, or on a full disk.
UNWRITABLE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}

# Warnings that a user can do nothing about, or of what is meant.
MEANT = (
    ".*intended to run from within Python like if it were.*",  # main reads the verb before LightningCLI does
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec, LeafSpec\\)`.*",
    ".*lr_scheduler.step.*",
    ".*smaller than the logging interval.*",  # the sparsity log has its own
    ".*Checkpoint directory .* exists and is not empty.*",  # checkpoint.enable_version_counter says what happens
    ".*Be aware that when using `ckpt_path`.*",
    ".*The dirpath has changed.*",
    ".*Converting a tensor with requires_grad=True to a scalar.*",
    ".*Total length of `list` across ranks is zero.*",  # data.validation_sequences 0
    # Lightning doubts that an iterable dataset with a length deals its batches to the workers, and that it can resume.
    # That of TextDataModule does both.
    ".*`IterableDataset` has `__len__` defined",
    ".*your dataloader is not resumable",
)


def set_up_process() -> None:
    """Set what holds for the whole process: filters of warnings and logs, precision of float32 matrix products."""
    for pattern in MEANT:
        warnings.filterwarnings("ignore", message=pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tip)
    if getattr(rank_zero_only, "rank", 0):
        _quieten()
    torch.set_float32_matmul_precision("high")
    threading.excepthook = _say_nothing_twice


def _no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def _say_nothing_twice(failed: threading.ExceptHookArgs) -> None:
    """Pass over TensorBoard's writer on a full disk: the run meets the same error at its next log, and tells it."""
    if not (isinstance(failed.exc_value, OSError) and failed.exc_value.errno in UNWRITABLE):
        threading.__excepthook__(failed)


def _quieten() -> None:
    """Leave it to rank zero to show progress and to warn of what holds for all ranks; errors are still told."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning)
    for name in ("leap_pl", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
