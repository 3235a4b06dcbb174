"""Length of a run: one epoch of the requested number of optimizer steps; conflicting trainer settings are refused."""

from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn

from leap_pl.errors import UserError

if TYPE_CHECKING:
    from lightning import Trainer


def check_run_length(trainer: "Trainer") -> None:
    """Check that the trainer reads the stream of blocks once, from its beginning to the last step.

    ``limit_val_batches`` may have any value: it limits validation to the first batches. So may ``max_epochs``, except
    for 0, with a warning: it changes nothing.

    Raises:
        UserError: A setting would read the same blocks again or end the run before its last step, or ``max_steps`` is
            not set.
    """
    if trainer.max_steps < 0:
        raise UserError(
            "A run on streamed text has no natural end, and trainer.max_steps is not set. "
            "Give the number of optimizer steps with --trainer.max_steps."
        )
    steps = "The length of a run is --trainer.max_steps, whatever the length of the text."
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise UserError(
            "trainer.fast_dev_run would write the mask of its few steps in place of that of the run. For a trial run, "
            "set --trainer.max_steps 1 --trainer.limit_val_batches 1 and another --checkpoint.dirpath."
        )
    overfit = trainer.overfit_batches  # type: ignore[attr-defined]
    if overfit:
        raise UserError(
            f"trainer.overfit_batches is {overfit}, and would validate on the training text. "
            "Leave it out; to learn on little text, name a short one, which repeats: --data.text FILE.jsonl."
        )
    limit = trainer.limit_train_batches
    if isinstance(limit, int) or limit != 1.0:
        raise UserError(f"trainer.limit_train_batches is {limit}, and would read the same blocks again. {steps}")
    interval = getattr(trainer, "val_check_interval", None)  # not there, if it is by the clock
    if interval is None and trainer.world_size > 1 and trainer.limit_val_batches:
        raise UserError(
            f"trainer.val_check_interval is a time, and each of the {trainer.world_size} ranks would look at its own "
            "clock. Give a number of micro-batches."
        )
    every = trainer.check_val_every_n_epoch
    if every not in (None, 1) and trainer.limit_val_batches:
        raise UserError(
            f"trainer.check_val_every_n_epoch is {every}, and a run is one epoch: nothing would be validated. Leave it "
            "out; trainer.val_check_interval says how often, in micro-batches."
        )
    batches = trainer.max_steps * trainer.accumulate_grad_batches
    beyond = isinstance(interval, int) and interval > batches and trainer.check_val_every_n_epoch is not None
    if beyond and trainer.limit_val_batches:
        raise UserError(
            f"trainer.val_check_interval is {interval:,}, and the run has {batches:,} micro-batches. Lower it, "
            "or leave it and trainer.check_val_every_n_epoch out."
        )
    for name in ("min_steps", "min_epochs"):
        least = getattr(trainer, name, None)
        if least:
            raise UserError(
                f"trainer.{name} is {least}, and a run is one epoch: neither trainer.max_time nor early stopping would "
                f"end it before its last step. Leave it out. {steps}"
            )
    if trainer.max_epochs == 0:
        raise UserError(f"trainer.max_epochs is 0, and nothing would be learned. Leave it out. {steps}")
    if trainer.max_epochs not in (None, -1):  # -1: none is given
        rank_zero_warn(
            f"not used: trainer.max_epochs, which is {trainer.max_epochs}. A run is one epoch of trainer.max_steps, "
            f"{trainer.max_steps:,} here, whatever the length of the text. For another one give --tokens."
        )
