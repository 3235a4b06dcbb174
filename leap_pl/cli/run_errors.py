"""Errors of a run that a setting, the machine or another rank causes, each as one line."""

import re
import time
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from leap_pl.cli.arguments import parser_message
from leap_pl.cli.process import UNWRITABLE
from leap_pl.distributed.strategy import lost_a_rank
from leap_pl.errors import UserError, is_out_of_memory, one_line, out_of_memory

PACKAGE = re.compile(r"pip install(?: -U)? ['\"]?([\w-]+)")  # in the errors of Lightning's optional classes

SECONDS_BEHIND = 2.0  # delay of a rank's exit after another rank was lost; launchers poll several times a second


@contextmanager
def errors_of_run() -> Iterator[None]:
    """Convert the errors of creating and running a trainer that have a remedy into a UserError."""
    try:
        yield
    except ArgumentError as error:
        raise UserError(parser_message(error)) from error
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise UserError(_of_memory(error)) from error
        if isinstance(error, MemoryError) or not lost_a_rank(error):
            raise
        # Launchers report the first rank that exits as the one that failed, which should be the lost rank.
        time.sleep(SECONDS_BEHIND)
        raise UserError(
            f"another rank has ended, and its own message says why ({str(error).splitlines()[0][-120:]}). "
            "Resume from the last checkpoint with --ckpt_path."
        ) from error
    except OSError as error:
        if is_out_of_memory(error):
            raise UserError(_of_memory(error)) from error
        if error.errno not in UNWRITABLE:
            raise
        place = f"{error.filename} cannot be written" if error.filename else "a file of the run cannot be written"
        raise UserError(
            f"{place} ({error.strerror}). Free space, or name other places with --checkpoint.dirpath and "
            "--trainer.logger.save_dir."
        ) from error
    except MisconfigurationException as error:  # errors that Lightning finds only when a run starts
        raise refusal(error) from error


def _of_memory(error: Exception) -> str:
    before = "; if it was making its prior, make that before, by leap_pl prune --device cpu"
    return (
        f"{out_of_memory(error)} Add --model.activation_checkpointing true, as a resumed run may too. For a new run: "
        "--config low_memory, or --data.batch_size 1 with more --trainer.accumulate_grad_batches"
        f"{before if isinstance(error, torch.OutOfMemoryError) else ''}."
    )


def package_in(error: Exception) -> str | None:
    """Return the package that the error of an optional class says to install, or None."""
    found = PACKAGE.search(one_line(error))
    return None if found is None else found[1]


def refusal(error: Exception) -> UserError:
    """Return the error of a class that refuses its settings as one line."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__  # jsonargparse wraps the errors of classes in a list
    if cause is not None:
        return cause
    message = one_line(error)
    if "enable_checkpointing" in message:
        message = (
            "trainer.enable_checkpointing false conflicts with the checkpoints that fit writes. To write none, set "
            "--checkpoint.save_top_k 0 --checkpoint.save_last false."
        )
    package = package_in(error)
    if package is not None:
        message = (
            f"a class of these settings needs the package {package}, which is not installed. Install it (pip "
            f"install {package}), or choose another class."
        )
    if "No supported gpu backend" in message or "can not run on your system" in message:
        message = (
            "trainer.accelerator asks for a device that this machine does not have, or that its torch cannot use. Give "
            "--trainer.accelerator cpu, or auto for what there is."
        )
    return UserError(message)
