"""When a run writes checkpoints: every so often, at its end, and when it is told to stop."""

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from leap_pl.callbacks.lightning_internals import SavingCheckpoint, requeuing, validate_if_due
from leap_pl.callbacks.mask_export import mask_place
from leap_pl.checkpoints.run_folder import Leftover, earlier_run, link_last, record_checkpoint
from leap_pl.checkpoints.signals import Stopped, StopSignals
from leap_pl.distributed.strategy import saves_shards
from leap_pl.escape import say
from leap_pl.files import atomic_folder, check_writable, flush, remove_abandoned
from leap_pl.inputs.ranges import check_numbers


class Checkpoints(SavingCheckpoint):
    """Lightning's ModelCheckpoint, so that a run that is stopped anywhere goes on as if it had not been.

    - The newest two are kept, so that one is left if the disk ruins the other; ``last.ckpt`` is a link to the
      newest and never dangles.
    - One is written at least every ``every_minutes``, beside what Lightning's own arguments ask for, and one at
      the end. The one of the last step comes when all else is done, the learned mask included: whoever finds
      it finds a finished run.
    - SIGTERM, SIGUSR1 (SLURM's warning) and SIGINT (Ctrl-C) are answered after the micro-batch at hand: a checkpoint is
      written, and the process ends with status 128 + the signal's number (143, 138, 130). Under SLURM's auto-requeue
      the job is then requeued. The same signal again, a second later or more, ends the process at once.
    - If the text fails to come (a network that stays away), a checkpoint is written before the run ends.
    - A validation that was due when the run was stopped is made up for when it goes on.
    - A run that Lightning ends before its last step (``trainer.max_time``, early stopping) leaves a checkpoint of the
      step that it has reached, and says so; there is no validation out of turn.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str = "{step}",
        monitor: str = "step",
        mode: str = "max",
        save_top_k: int = 2,
        save_last: bool | Literal["link"] | None = "link",
        every_minutes: float = 30.0,
        save_on_train_epoch_end: bool | None = False,
        enable_version_counter: bool = False,
        **kwargs: Any,
    ) -> None:
        """Take the times and places; all but ``every_minutes`` are ModelCheckpoint's.

        Args:
            dirpath: Folder of the checkpoints. ``--ckpt_path last`` looks there.
            filename: Of a checkpoint, from the names of metrics.
            monitor: What is compared to keep the best; ``step`` keeps the newest.
            mode: Whether more (``max``) or less (``min``) of it is better.
            save_top_k: How many to keep; −1: all.
            save_last: ``link``: ``last.ckpt`` is a symbolic link to the newest.
            every_minutes: Write one at least so often; 0: only when the other arguments say so.
            save_on_train_epoch_end: A run is one epoch.
            enable_version_counter: Lightning's way to keep older checkpoints of the same name. It is not needed: a
                folder that holds another run is refused.
            kwargs: The others of ModelCheckpoint; without any of them one is written at every validation.
        """
        check_numbers({"every_minutes": every_minutes, "save_top_k": save_top_k, **kwargs}, "checkpoint.")
        super().__init__(
            dirpath,
            filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=save_last,
            save_on_train_epoch_end=save_on_train_epoch_end,
            enable_version_counter=enable_version_counter,
            **kwargs,
        )
        self.every_minutes = every_minutes
        self.signals = StopSignals()
        self._written = time.monotonic()
        self._running = False
        self._validated_step = -1
        self._limit_val_batches: int | float | None = None  # the trainer's, while there is not to be any validation
        # Whether to replace an earlier run in the folder, as the command line was told; None: there is no command line.
        self.force: bool | None = None
        self.last = False  # whether it was told to resume from the last one, should there be any
        self._replaced: list[Leftover] = []

    # -- when ---------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Clear away what killed runs left half-written; from here on a signal ends the run in order."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if trainer.is_global_zero and self.dirpath is not None and "://" not in str(self.dirpath):
            check_writable(Path(self.dirpath))  # a bad folder fails at once, and not after hours
            if self.force is not None:
                self._look_for_earlier_run(trainer, getattr(pl_module, "resumes_from", None))
            remove_abandoned(Path(self.dirpath))
        self.signals = StopSignals()
        self.signals.install()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove an earlier run that is replaced; ``last.ckpt`` is the checkpoint that is resumed from."""
        for leftover in self._replaced:  # not before: all that could be wrong with the new run has been looked at
            leftover.remove()
        self._replaced = []
        if self.save_last == "link" and trainer.ckpt_path is not None and trainer.is_global_zero:
            link_last(Path(str(self.dirpath)), Path(trainer.ckpt_path))

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning has put its own handlers over these, which write no checkpoint."""
        self.signals.install()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate, if the run was stopped before a validation that was due."""
        if self.force is None:  # a program has told the trainer, and nobody before, what it resumes from
            self._look_for_earlier_run(trainer, trainer.ckpt_path)
        super().on_train_start(trainer, pl_module)
        slurm = requeuing(trainer)
        self.signals.install(*([slurm.requeue_signal] if slurm and slurm.requeue_signal else []))
        self._written, self._running = time.monotonic(), True
        if trainer.ckpt_path is not None and self.dirpath is not None:
            resumed_here = Path(trainer.ckpt_path).resolve().parent == Path(self.dirpath).resolve()
            self.note_saved(trainer.global_step if resumed_here else 0, self.saved_path)
            if self._validated_step != trainer.global_step:
                validate_if_due(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A micro-batch begins: signals wait for its end."""
        self.signals.at_once = False
        self.signals.word = "a checkpoint is written after this micro-batch. The same signal again ends at once."
        if batch_idx + 1 == trainer.max_steps * trainer.accumulate_grad_batches:
            self.signals.word = "this is the last step, and the run finishes. The same signal again ends at once."

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write one if it is due after an optimizer step; heed a signal after any micro-batch."""
        if self._finishing(trainer):
            return
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if self._time_is_up(trainer):
                self.save(trainer)
        self._heed(trainer)
        if _ends_early(trainer):
            # Lightning would validate out of turn: a point in the curves that a run without a stop does not have.
            self._skip_validation(trainer)
        # What follows until the next micro-batch, waiting for text, can be broken off. Several ranks stop together.
        self.signals.at_once = trainer.world_size == 1

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Validation in the run can be broken off after each batch."""
        if self._running and not self._finishing(trainer):
            self.signals.at_once = False
            self._heed(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write one if one is due at validations; heed a signal."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._validated_step = trainer.global_step
        if not self._finishing(trainer):
            super().on_validation_end(trainer, pl_module)
            self._heed(trainer)
            self.signals.at_once = trainer.world_size == 1

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last one: all other callbacks are through."""
        self._validate_again(trainer)
        self.save(trainer)
        self._running = False

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say of a run that was ended before its last step that it is not finished."""
        if self._finishing(trainer) or not trainer.is_global_zero:
            return
        step, saved = trainer.global_step, self.saved_step == trainer.global_step
        where = f"The checkpoint of step {step} is {f'in {self.dirpath}' if saved else trainer.ckpt_path}"
        remedy = "Resume with --ckpt_path last" if step else "Start it again with more time"
        if any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            remedy += " and a longer --trainer.max_time, which counts the time of all starts" if step else ""
        print(
            f"leap_pl fit: ended at step {step} of {trainer.max_steps}; learning is not finished, and no mask is "
            f"written. {where if step else 'There is no checkpoint'}. {remedy}.",
            file=sys.stderr,
            flush=True,
        )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write one if the run was told to stop, or its text has failed."""
        told = isinstance(exception, Stopped)
        self._validate_again(trainer)
        waiting = self.signals.at_once and trainer.world_size == 1  # amid a micro-batch the optimizer may be half done
        self.signals.at_once = False
        if self._running and not self._finishing(trainer) and (told or waiting):
            self._running = False
            self.signals.word = "a checkpoint is being written. The same signal again ends at once."
            self.save(trainer)
        else:
            super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, Stopped):
            self._tell(trainer, exception)
        self.signals.remove()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self.signals.remove()

    def _look_for_earlier_run(self, trainer: L.Trainer, ckpt_path: Any) -> None:
        local = self.dirpath is not None and "://" not in str(self.dirpath)
        if trainer.is_global_zero and local and not self.saved_path:  # else this object wrote what is there
            folder = Path(str(self.dirpath))
            self._replaced = earlier_run(
                folder, mask_place(trainer), ckpt_path=ckpt_path, force=bool(self.force), last=self.last
            )

    # -- how ----------------------------------------------------------------------------------------------

    def write(self, trainer: L.Trainer, path: str) -> None:
        """Write a checkpoint, and before it the curves up to it: a run that goes on from it does not draw them."""
        for logger in trainer.loggers:
            logger.save()
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                for events in Path(logger.log_dir).glob("events.out.tfevents.*"):
                    flush(events)
        if trainer.is_global_zero and "://" not in str(path):
            record_checkpoint(Path(path).parent, Path(path).name)
        if saves_shards(trainer):
            self._write_folder(trainer, path)
        else:
            super().write(trainer, path)
        self._written = time.monotonic()

    def _write_folder(self, trainer: L.Trainer, path: str) -> None:
        """Every rank writes its part into one folder aside, which gets its name when all of them are through."""
        with ExitStack() as stack:
            aside = None
            if trainer.is_global_zero:
                aside = stack.enter_context(atomic_folder(path, force=True, own=True, verb="fit"))
            super().write(trainer, str(trainer.strategy.broadcast(aside)))
        trainer.strategy.barrier()
        self.note_saved(trainer.global_step, path)

    def _time_is_up(self, trainer: L.Trainer) -> bool:
        if not self.every_minutes:
            return False
        return bool(trainer.strategy.broadcast(time.monotonic() - self._written >= 60 * self.every_minutes))

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, and the step of the last validation."""
        return {**super().state_dict(), "validated_step": self._validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up."""
        super().load_state_dict(state_dict)
        self._validated_step = state_dict["validated_step"]

    # -- stopping -----------------------------------------------------------------------------------------

    def _heed(self, trainer: L.Trainer) -> None:
        """Stop, on all ranks after the same micro-batch, if any of them was told to."""
        if trainer.world_size > 1:
            asked = Tensor([self.signals.asked or 0]).to(trainer.strategy.root_device)
            self.signals.asked = int(trainer.strategy.reduce(asked, reduce_op="max")) or None
        self.signals.heed()

    def _finishing(self, trainer: L.Trainer) -> bool:
        return trainer.global_step >= trainer.max_steps

    def _tell(self, trainer: L.Trainer, stopped: Stopped) -> None:
        if not trainer.is_global_zero:
            return
        step = self.saved_step
        if step:
            what = f"stopped at step {trainer.global_step} of {trainer.max_steps}; the checkpoint of step {step} is in "
            what += f"{self.dirpath}. Go on with --ckpt_path last."
        else:
            what = "stopped before the first step was done; there is nothing to write."
        say("", sys.stderr)  # a progress bar may stand in this line
        say(f"leap_pl fit: {stopped.signal.name}: {what}", sys.stderr)
        slurm = requeuing(trainer)
        if slurm and stopped.signal == slurm.requeue_signal:
            requeue()

    def _skip_validation(self, trainer: L.Trainer) -> None:
        if self._limit_val_batches is None:
            self._limit_val_batches = trainer.limit_val_batches
            trainer.limit_val_batches = 0

    def _validate_again(self, trainer: L.Trainer) -> None:
        if self._limit_val_batches is not None:
            trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None


def _ends_early(trainer: L.Trainer) -> bool:
    """Whether Lightning is about to end the run, and not because its last step is done."""
    enough = trainer.global_step >= (trainer.min_steps or 0) and trainer.current_epoch >= (trainer.min_epochs or 0)
    return bool(trainer.should_stop and enough and trainer.global_step < trainer.max_steps)


def requeue() -> None:
    """Put this SLURM job back into the queue; it goes on from its newest checkpoint."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
        say(f"leap_pl fit: job {job} is in the queue again.", sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"leap_pl fit: job {job} could not be requeued ({error}).", sys.stderr)
