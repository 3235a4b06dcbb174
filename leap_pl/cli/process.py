"""Settings of the process that runs a verb of the trainer: warnings, logging, precision of matrix products."""

import errno
import logging
import threading
import warnings

import torch
from lightning.pytorch.utilities import rank_zero_only

# Errors of the logger and of saving the config in a folder that cannot be written, or on a full disk.
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

# Warnings about intended behaviour, or that users can do nothing about.
MEANT = (
    ".*intended to run from within Python like if it were.*",  # main reads the verb before LightningCLI does
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec, LeafSpec\\)`.*",
    ".*lr_scheduler.step.*",
    ".*smaller than the logging interval.*",  # the sparsity log has its own
    ".*Checkpoint directory .* exists and is not empty.*",  # see checkpoint.enable_version_counter
    ".*Be aware that when using `ckpt_path`.*",
    ".*The dirpath has changed.*",
    ".*Converting a tensor with requires_grad=True to a scalar.*",
    ".*Total length of `list` across ranks is zero.*",  # data.validation_sequences 0
    # Lightning warns that an iterable dataset with a length may not split its batches among workers, or resume. That of
    # TextDataModule does both.
    ".*`IterableDataset` has `__len__` defined",
    ".*your dataloader is not resumable",
)


def set_up_process() -> None:
    """Set filters of warnings and logs, and the precision of float32 matrix products, for the whole process."""
    for pattern in MEANT:
        warnings.filterwarnings("ignore", message=pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tip)
    if getattr(rank_zero_only, "rank", 0):
        _quieten()
    torch.set_float32_matmul_precision("high")
    threading.excepthook = _ignore_write_errors


def _no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def _ignore_write_errors(failed: threading.ExceptHookArgs) -> None:
    """Ignore write errors in TensorBoard's thread: the run reports the same error at its next log."""
    if not (isinstance(failed.exc_value, OSError) and failed.exc_value.errno in UNWRITABLE):
        threading.__excepthook__(failed)


def _quieten() -> None:
    """Disable progress bars and warnings on this rank, which rank zero shows for all ranks; errors are still shown."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning)
    for name in ("leap_pl", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
