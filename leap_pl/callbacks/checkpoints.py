"""Checkpoint callback: saves at intervals, at the end of the run, and on signals."""

import os
import re
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from leap_pl.callbacks.lightning_internals import (
    SavingCheckpoint,
    ends_step,
    exchange_no_signals,
    requeuing,
    validate_if_due,
)
from leap_pl.callbacks.mask_export import mask_place
from leap_pl.callbacks.unfinished_run import UnfinishedRun, refuse_requeue, requeue
from leap_pl.checkpoints.file import write_whole
from leap_pl.checkpoints.run_folder import Leftover, earlier_run, lies_in, link_last, record_checkpoint
from leap_pl.checkpoints.signals import Stopped, StopSignals
from leap_pl.distributed.strategy import RankZero, saves_shards
from leap_pl.errors import UserError, listing, one_line
from leap_pl.files import atomic_folder, check_writable, flush, remove_abandoned
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.ranges import check_numbers
from leap_pl.inputs.register import current
from leap_pl.training.trainer_checks import fields_of

PERPLEXITY = "perplexity/"  # what the names of perplexities begin with


class Checkpoints(SavingCheckpoint):
    """Lightning's ModelCheckpoint, extended so that a run can stop at any point and resume with the same results.

    - The newest two checkpoints are kept, so that one is left if the other is damaged; ``last.ckpt`` is a link to the
      newest and never dangles.
    - A checkpoint is written at least every ``every_minutes``, in addition to those of Lightning's arguments, and one
      at the end. The checkpoint of the last step is written after everything else, the learned mask included: if it
      exists, the run is finished.
    - SIGTERM, SIGUSR1 (SLURM's warning) and SIGINT (Ctrl-C) are handled after the current micro-batch: a checkpoint is
      written, and the process ends with status 128 + the signal's number (143, 138, 130). Under SLURM's auto-requeue
      the job is then requeued. The same signal again, after a second or more, ends the process at once.
    - If reading the text fails (such as on a network failure), a checkpoint is written before the run ends; with
      several ranks the last one at an interval counts, since the others are within a step.
    - A validation that was due when the run was stopped is run on resume.
    - A run that Lightning ends before its last step (``trainer.max_time``, early stopping) writes a checkpoint of its
      current step and a message, without an extra validation.
    """

    reports_end = True  # of a run that ends before its last step

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str = "{step}",
        monitor: str = "step",
        mode: Literal["min", "max"] | None = None,
        save_top_k: int = 2,
        save_last: bool | Literal["link"] | None = "link",
        every_minutes: float = 30.0,
        save_on_train_epoch_end: bool | None = False,
        enable_version_counter: bool = False,
        **kwargs: Any,
    ) -> None:
        """Set intervals and paths; all arguments but ``every_minutes`` are ModelCheckpoint's.

        Args:
            dirpath: Folder of the checkpoints, in which ``--ckpt_path last`` looks for the newest.
            filename: File name of a checkpoint, a format string of metric names.
            monitor: Metric that decides which checkpoints are kept; ``step`` keeps the newest.
            mode: Whether a higher (``max``) or a lower (``min``) value of the metric is better; by default a higher
                ``step`` or ``epoch``, and a lower value of every other.
            save_top_k: Number of checkpoints to keep; −1: all.
            save_last: Whether ``last.ckpt`` is written; ``link`` makes it a symbolic link to the newest.
            every_minutes: Maximum time between checkpoints; 0: only the other arguments decide.
            save_on_train_epoch_end: True is refused: a run is one epoch, and its last checkpoint comes after the mask.
            enable_version_counter: Whether to keep older checkpoints of the same name. Not needed: a folder that holds
                another run is refused.
            kwargs: Other arguments of ModelCheckpoint; by default a checkpoint is written at every validation.
        """
        _check_filename(filename, inserts_names=kwargs.get("auto_insert_metric_name", True))
        check_numbers({"every_minutes": every_minutes, "save_top_k": save_top_k, **kwargs}, "checkpoint.")
        if kwargs.get("save_weights_only"):
            raise UserError(
                "checkpoint.save_weights_only leaves out what a run needs to resume. Leave it out: the model is in no "
                "checkpoint anyway, and leap_pl export takes the mask from any."
            )
        if save_on_train_epoch_end:
            raise UserError(
                "checkpoint.save_on_train_epoch_end would write the last checkpoint, by which a run is finished, "
                "before the mask. Leave it out: one is written at the end anyway."
            )
        if (kwargs.get("every_n_epochs") or 1) > 1:
            raise UserError(
                f"checkpoint.every_n_epochs is {kwargs['every_n_epochs']}, and a run is one epoch: nothing would be "
                "saved at validations. Leave it out, or give --checkpoint.every_n_train_steps."
            )
        _check_folder(dirpath)
        super().__init__(
            dirpath,
            filename,
            monitor=monitor,
            mode=mode or ("max" if monitor in ("step", "epoch") else "min"),
            save_top_k=save_top_k,
            save_last=save_last,
            save_on_train_epoch_end=False,  # of None Lightning would decide
            enable_version_counter=enable_version_counter,
            **kwargs,
        )
        self.every_minutes, self._named = every_minutes, dirpath is not None
        self.signals = StopSignals()
        self._written = time.monotonic()
        self._running = False
        self._group: dist.ProcessGroup | None = None  # of all ranks, on the host
        self._validated_step = self._resumed_at = self._stepped = -1
        self._limit_val_batches: int | float | None = None  # the Trainer's setting, while validation is disabled
        # Whether to replace an earlier run in the folder, as set on the command line; None: there is no command line.
        self.force: bool | None = None
        self.last = False  # whether to resume from the last checkpoint if there is one
        self._replaced: list[Leftover] = []
        self._names: set[str] | None = None  # in the folder when the run was resumed
        self._resumes_here = False  # from a checkpoint in the folder, which may have been another when it was written
        self._scored_on: dict[str, Any] | None = None  # conditions of the perplexities that the scores are
        self._surplus: list[str] = []  # of a run with a larger save_top_k: removed once the next is written

    # -- schedule -----------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove incomplete files of killed runs, and install the signal handlers."""
        try:
            super().setup(trainer, pl_module, stage)
        except ValueError:
            _check_folder(self.dirpath)  # which may be that of a logger
            raise
        if stage != "fit":
            return
        write_whole(trainer)
        _check_folder(self.dirpath)
        if self.dirpath is not None and not self._named:  # that of a logger, as the logger reads it
            variables = os.path.expandvars if isinstance(trainer.logger, TensorBoardLogger) else str
            self.dirpath = str(expanded(variables(str(self.dirpath))))
        if trainer.is_global_zero and self.dirpath is not None:
            check_writable(Path(self.dirpath))  # fails at once, not after hours
            if self.force is not None:
                self._look_for_earlier_run(trainer, getattr(pl_module, "resumes_from", None))
            remove_abandoned(Path(self.dirpath))
        self.signals = StopSignals()
        self.signals.install()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove an earlier run that is replaced."""
        for leftover in self._replaced:  # not before all checks of the new run have passed
            leftover.remove()
        self._replaced = []

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the signal handlers again: Lightning has replaced them with its own, which write no checkpoint."""
        self.signals.install()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Link ``last.ckpt`` to the checkpoint that the run resumes from; validate, if a validation was due then."""
        if trainer.ckpt_path is None:
            self.forget()
            self._scored_on = None
        if self.force is None:  # without a command line, only fit() gets the path of the checkpoint
            self._look_for_earlier_run(trainer, trainer.ckpt_path)
        # Not on_fit_start: Lightning loads the checkpoint of a sharded run after it, and sets its path then.
        if self.save_last == "link" and trainer.ckpt_path is not None and trainer.is_global_zero:
            link_last(Path(str(self.dirpath)), Path(trainer.ckpt_path))
        super().on_train_start(trainer, pl_module)
        slurm = requeuing(trainer)
        self.signals.install(*([slurm.requeue_signal] if slurm and slurm.requeue_signal else []))
        exchange_no_signals(trainer)
        self.signals.at_once = trainer.world_size == 1  # several ranks have to stop together
        self._written, self._running, self._stepped = time.monotonic(), True, trainer.global_step
        if trainer.ckpt_path is not None and self.dirpath is not None:
            resumed_here = lies_in(trainer.ckpt_path, Path(self.dirpath))
            self.note_saved(trainer.global_step if resumed_here else 0, self.saved_path)
            self._resumed_at = trainer.global_step if resumed_here else -1
            if self._validated_step != trainer.global_step:
                validate_if_due(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Delay signals until the end of the micro-batch."""
        self.signals.at_once = False
        self.signals.message = "a checkpoint is written after this micro-batch. The same signal again ends at once."
        if trainer.global_step + 1 == trainer.max_steps and ends_step(trainer, batch_idx):
            self.signals.message = "this is the last step, and the run finishes. The same signal again ends at once."

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint if one is due after an optimizer step; handle a pending signal after any micro-batch."""
        if self._finishing(trainer):
            return
        if trainer.global_step != self._stepped:  # the last micro-batch of an epoch ends a step, too
            self._stepped = trainer.global_step
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if self._time_is_up(trainer):
                self.save(trainer)
        self._stop_if_signalled(trainer)
        if _ends_early(trainer):
            # Lightning would run an extra validation: a point in the curves that an uninterrupted run does not have.
            self._skip_validation(trainer)
        # Waiting for text, until the next micro-batch, can be interrupted. Several ranks have to stop together.
        self.signals.at_once = trainer.world_size == 1

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Handle a pending signal before each batch of a validation within the run."""
        if self._running and not self._finishing(trainer):
            self.signals.at_once = False
            self._stop_if_signalled(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write a checkpoint if one is due at validations; handle a pending signal."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._validated_step = trainer.global_step
        self._compare_alike(trainer, pl_module)
        if not self._finishing(trainer):
            super().on_validation_end(trainer, pl_module)
            self._stop_if_signalled(trainer)
            self.signals.at_once = trainer.world_size == 1

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last checkpoint, after all other callbacks have finished."""
        self._validate_again(trainer)
        self.save(trainer)
        self._running = False
        self._free_state(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print that the run is not finished, if it ended before its last step."""
        if self._finishing(trainer) or not trainer.is_global_zero:
            return
        self._unfinished(trainer).report_end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write a checkpoint if the run was stopped by a signal, or reading its text failed."""
        stopped, learning = isinstance(exception, Stopped), self._running
        self._validate_again(trainer)
        waiting = self.signals.at_once and trainer.world_size == 1  # within a micro-batch a step may be half done
        self.signals.at_once = False
        if self._running and not self._finishing(trainer) and (stopped or waiting):
            self._running = False
            self.signals.message = "a checkpoint is being written. The same signal again ends at once."
            self.save(trainer)
        elif self._running:  # else it has nothing new to save
            super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, Stopped):
            self._report_stop(trainer, exception, learning=learning)
        self.signals.remove()
        self._free_state(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the previous signal handlers."""
        self.signals.remove()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _look_for_earlier_run(self, trainer: L.Trainer, ckpt_path: Any) -> None:
        if trainer.is_global_zero and self.dirpath is not None and not self.saved_path:  # else this object wrote them
            folder = Path(str(self.dirpath))
            self._replaced = earlier_run(
                folder, mask_place(trainer), ckpt_path=ckpt_path, force=bool(self.force), last=self.last
            )

    # -- writing ------------------------------------------------------------------------------------------

    def write(self, trainer: L.Trainer, path: str) -> None:
        """Write a checkpoint after flushing the curves up to it: a run that resumes from it does not log them again."""
        for logger in trainer.loggers:
            logger.save()
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                for events in Path(logger.log_dir).glob("events.out.tfevents.*"):
                    flush(events)
        if trainer.is_global_zero:
            record_checkpoint(Path(path).parent, Path(path).name)
        if saves_shards(trainer):
            self._write_folder(trainer, path)
        else:
            super().write(trainer, path)
        self._written = time.monotonic()
        surplus, self._surplus = self._surplus, []
        self.remove(trainer, surplus, path)

    def _write_folder(self, trainer: L.Trainer, path: str) -> None:
        """Write a distributed checkpoint: each rank writes its part to a temporary folder, which is renamed last."""
        with ExitStack() as stack:
            aside = None
            if trainer.is_global_zero:
                aside = stack.enter_context(atomic_folder(path, force=True, own=True, verb="fit"))
            super().write(trainer, str(trainer.strategy.broadcast(aside)))
        trainer.strategy.barrier()
        self.note_saved(trainer.global_step, path)

    def _compare_alike(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare perplexities of one text only, since a resumed run may validate on another."""
        hard = getattr(getattr(pl_module, "validation", None), "hard", None)
        before, self._scored_on = self._scored_on, None if hard is None else hard.of
        if None in (before, self._scored_on) or before == self._scored_on:
            return
        what = "perplexities are no longer measured as before this run was resumed (another text, or other settings): "
        if self.best_k_models and str(self.monitor).startswith(PERPLEXITY):
            self.reset_scores()
            rank_zero_warn(f"{what}the checkpoints of before count as worse than those that follow.")
        others: list[Any] = [one for one in trainer.callbacks if one is not self]  # type: ignore[attr-defined]
        named = {type(one).__name__ for one in others if str(getattr(one, "monitor", "")).startswith(PERPLEXITY)}
        if named:
            rank_zero_warn(f"{what}{listing(sorted(named))} compares with those of before nevertheless.")

    def is_measured(self, trainer: L.Trainer) -> bool:
        """Return whether the monitored metric is of the current step: perplexities are of the last validation."""
        return not str(self.monitor).startswith(PERPLEXITY) or self._validated_step == trainer.global_step

    def _time_is_up(self, trainer: L.Trainer) -> bool:
        if not self.every_minutes:
            return False
        mine = time.monotonic() - self._written >= 60 * self.every_minutes
        return bool(self._greatest(trainer, int(mine and trainer.is_global_zero)))  # of one clock

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adopt the state of a run with other intervals, and note which checkpoints are in the folder.

        The newest of the former run are counted and removed by this one, if they are there.
        """
        states = checkpoint.get("callbacks") or {}
        path, folder = trainer.ckpt_path, Path(str(self.dirpath))
        self._resumes_here = path is not None and self.dirpath is not None and lies_in(path, folder)
        names = [file.name for file in folder.iterdir()] if self.dirpath is not None and folder.is_dir() else []
        self._names = set(trainer.strategy.broadcast(names))  # every rank counts the same
        same = f"{type(self).__qualname__}{{'monitor': {self.monitor!r}, 'mode': {self.mode!r}, "
        former = [key for key in states if str(key).startswith(same)]
        if self.state_key not in states and len(former) == 1:
            states[self.state_key] = states[former[0]]

    def state_dict(self) -> dict[str, Any]:
        """Return Lightning's state, step and conditions of the last validation, and whether a checkpoint waits."""
        validated = {"validated_step": self._validated_step, "scored_on": self._scored_on}
        return {**super().state_dict(), **validated, "waits": self.waits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load Lightning's state, and step and conditions of the last validation."""
        there = state_dict.get("dirpath", self.dirpath)
        own = self._resumes_here or there is None or str(there) == str(self.dirpath)
        # Of another folder Lightning takes nothing but the path of the best, and says so.
        super().load_state_dict(
            self.own_paths(state_dict, self._names) if own else {**state_dict, "best_model_path": ""}
        )
        self.best_k_models = dict(self.best_k_models)  # which is the checkpoint's
        self._surplus = self.drop_surplus()
        self._validated_step = state_dict["validated_step"]
        self.waits = bool(state_dict.get("waits", False))  # not of earlier versions
        self._scored_on = state_dict.get("scored_on")

    # -- stopping -----------------------------------------------------------------------------------------

    def _stop_if_signalled(self, trainer: L.Trainer) -> None:
        """Stop if any rank received a signal, on all ranks after the same micro-batch."""
        self.signals.asked = self._greatest(trainer, self.signals.asked or 0) or None
        self.signals.raise_pending()

    def _greatest(self, trainer: L.Trainer, number: int) -> int:
        """Return the greatest ``number`` of all ranks, which exchange it on the host: no device waits for it."""
        if trainer.world_size == 1:
            return number
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=RankZero.TIMEOUT)
        numbers = torch.tensor([number], device="cpu")
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        return int(numbers)

    def _finishing(self, trainer: L.Trainer) -> bool:
        return trainer.global_step >= trainer.max_steps

    def _unfinished(self, trainer: L.Trainer) -> UnfinishedRun:
        resumed = trainer.ckpt_path is not None and self.saved_step == self._resumed_at  # no step is saved since then
        return UnfinishedRun(
            step=trainer.global_step,
            max_steps=trainer.max_steps,
            saved_step=self.saved_step,
            saved_path=str(trainer.ckpt_path) if resumed else self.saved_path,
            folder=Path(str(self.dirpath)),
            is_named=self._named,
            is_off=self.save_top_k == 0 and not self.save_last,
            began_with=None if trainer.ckpt_path is None else str(trainer.ckpt_path),
        )

    def _report_stop(self, trainer: L.Trainer, stopped: Stopped, *, learning: bool) -> None:
        if trainer.is_global_zero:
            self._report_stop_of_all(trainer, stopped, learning=learning)
        # srun ends all ranks with the first that ends: the others wait until the job is in the queue again.
        if learning:
            with suppress(RuntimeError):  # of a rank that a second signal has ended
                self._greatest(trainer, 0)

    def _report_stop_of_all(self, trainer: L.Trainer, stopped: Stopped, *, learning: bool) -> None:
        run, slurm = self._unfinished(trainer), requeuing(trainer)
        run.report_stop(stopped.signal.name, learning=learning)
        if slurm and stopped.signal == slurm.requeue_signal and run.can_go_on:
            if self._named or self.force is None:  # a script may name a checkpoint by itself
                requeue()
            else:
                refuse_requeue()

    def _free_state(self, trainer: L.Trainer) -> None:
        """Free gradients and optimizer states after a run of the command line, unless another callback may save them.

        Lightning copies what is on a device to host memory at its end: of these up to 12 bytes a weight, on every rank.
        """
        alone = trainer.checkpoint_callbacks == [self] and not getattr(self, "save_on_exception", False)
        if current() is not None and alone:
            for optimizer in trainer.optimizers:
                optimizer.zero_grad()
                optimizer.state.clear()

    def _skip_validation(self, trainer: L.Trainer) -> None:
        if self._limit_val_batches is None:
            self._limit_val_batches = trainer.limit_val_batches
            trainer.limit_val_batches = 0

    def _validate_again(self, trainer: L.Trainer) -> None:
        if self._limit_val_batches is not None:
            trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None


def _check_folder(dirpath: Any) -> None:
    """Check that a folder of checkpoints is one.

    Raises:
        UserError: It is a URL.
    """
    if "://" in str(dirpath):
        raise UserError(
            f"checkpoint.dirpath {dirpath} is a URL, and a run resumes from files. Give a folder, which may be mounted."
        )


def _check_filename(filename: str, *, inserts_names: bool) -> None:
    """Check that checkpoints can be named, and lie in their folder, where a resumed run looks for them.

    Raises:
        UserError: ``filename`` is no format of numbers; or the names have a slash, as the names of metrics have.
    """
    try:
        for name, form in fields_of(filename):
            format(1 if name in ("step", "epoch") else 1.0, form)
    except ValueError as error:
        raise UserError(
            f"checkpoint.filename {filename} is no format of names and numbers ({one_line(error)}). Give one such as "
            "'{step}', or '{step:06d}'."
        ) from error
    without_fields = re.sub(r"\{[^}]*\}", "", filename)
    if "/" in (filename if inserts_names else without_fields):
        raise UserError(
            f"checkpoint.filename {filename} makes folders in checkpoint.dirpath, where no checkpoint is looked for. "
            "For a metric whose name has a slash: --checkpoint.auto_insert_metric_name false --checkpoint.filename "
            "'step={step}-perplexity={perplexity/hard:.2f}'."
        )


def _ends_early(trainer: L.Trainer) -> bool:
    """Return whether Lightning is about to end the run before its last step."""
    enough = trainer.global_step >= (trainer.min_steps or 0) and trainer.current_epoch >= (trainer.min_epochs or 0)
    return bool(trainer.should_stop and enough and trainer.global_step < trainer.max_steps)
