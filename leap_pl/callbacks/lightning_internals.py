"""Behind Lightning's public face: how ModelCheckpoint saves, and when the training loop validates.

The one place where callbacks use what Lightning keeps to itself. Where a version of it lacks that, a run does with what
is public, and says once what it does without.
"""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from leap_pl.checkpoints.run_folder import link_last
from leap_pl.errors import warn_once
from leap_pl.files import atomic_file, atomic_link

_METHODS = (
    "_link_checkpoint",
    "_monitor_candidates",
    "_save_checkpoint",
    "_save_last_checkpoint",
    "_save_topk_checkpoint",
    "_should_remove_checkpoint",
    "_should_skip_saving_checkpoint",
)
_STATE = ("_last_checkpoint_saved", "_last_global_step_saved")


class SavingCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that also saves when it is asked to, and whose every write a subclass may change.

    Where Lightning's own has other methods than those known here, its regular checkpoints are written as it writes
    them, and those that are asked for beside them, each under its step.

    Attributes:
        saved_step: Optimizer step of the newest checkpoint that this object wrote; 0 before.
        saved_path: Its path; empty before.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what ModelCheckpoint takes."""
        super().__init__(*args, **kwargs)
        self.saved_step, self.saved_path = 0, ""
        missing = [name for name in _METHODS if not hasattr(ModelCheckpoint, name)]
        missing += [name for name in _STATE if not hasattr(self, name)]
        self._known = not missing
        if missing:
            warn_once(
                f"this version of Lightning saves in another way (ModelCheckpoint has no {', '.join(missing)}): "
                "checkpoints at signals, by the clock and at the end are written beside its own, and none is removed."
            )

    def save(self, trainer: L.Trainer) -> None:
        """Write a checkpoint of the last optimizer step, unless there is one."""
        if not self._known:
            self._save_in_public(trainer)
            return
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor in candidates:
            self._save_topk_checkpoint(trainer, candidates)
        if self.save_last == "link" and self.saved_step != trainer.global_step:
            # It was not among the best of the monitor, and the newest is wanted all the same.
            self._save_checkpoint(trainer, self.format_checkpoint_name(candidates, self.CHECKPOINT_NAME_LAST))
        else:
            self._save_last_checkpoint(trainer, candidates)

    def write(self, trainer: L.Trainer, path: str) -> None:
        """Write a checkpoint to ``path``."""
        if self._known:
            super()._save_checkpoint(trainer, path)
        else:
            trainer.save_checkpoint(path, self.save_weights_only)
        self.note_saved(trainer.global_step, path)

    def note_saved(self, step: int, path: str) -> None:
        """Take the checkpoint ``path``, of the optimizer step ``step``, for the newest that was written."""
        self.saved_step, self.saved_path = step, path
        self._last_global_step_saved, self._last_checkpoint_saved = step, path

    def _save_in_public(self, trainer: L.Trainer) -> None:
        learning = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not learning or self.saved_step == trainer.global_step:
            return
        metrics = {**trainer.callback_metrics, "step": torch.tensor(trainer.global_step)}
        path = self.format_checkpoint_name({**metrics, "epoch": torch.tensor(trainer.current_epoch)})
        self.write(trainer, path)
        if self.save_last == "link" and trainer.is_global_zero:
            link_last(Path(path).parent, Path(path))

    # What ModelCheckpoint calls.

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        self.write(trainer, filepath)

    @staticmethod
    def _link_checkpoint(trainer: L.Trainer, filepath: str, linkpath: str) -> None:
        """Lightning's own removes the old link first."""
        if trainer.is_global_zero and Path(filepath) != Path(linkpath):
            try:
                atomic_link(Path(linkpath), Path(filepath))
            except OSError:  # a file system without links
                with atomic_file(linkpath, own=True) as temporary:
                    temporary.write_bytes(Path(filepath).read_bytes())
        trainer.strategy.barrier()

    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        """Also the one that the run was resumed from, once newer ones stand: else each resume leaves one for ever."""
        return previous != current and self.dirpath is not None and Path(self.dirpath) in Path(previous).parents


def validate_if_due(trainer: L.Trainer) -> None:
    """Validate, if Lightning would do so after the step that the run was resumed at."""
    loop = trainer.fit_loop.epoch_loop
    try:
        fetcher = trainer.fit_loop._data_fetcher
        due = fetcher is not None and loop._should_check_val_fx(fetcher)
    except AttributeError:
        warn_once(
            "this version of Lightning does not tell whether a validation is due: one before which the run was stopped "
            "is not made up for."
        )
        return
    if due:
        # Else Lightning goes on at the batch that the checkpoint's loop stood at, without the metrics up to there.
        loop.val_loop.restarting = False
        trainer.validating = True
        loop.val_loop.run()
        trainer.training = True


def requeuing(trainer: L.Trainer) -> SLURMEnvironment | None:
    """Return the environment of a SLURM job that is put back into the queue when it is stopped; None in other runs."""
    environment: Any
    try:
        environment = trainer._accelerator_connector.cluster_environment
    except AttributeError:
        if not SLURMEnvironment.detect():
            return None
        warn_once("this version of Lightning does not tell whether the job is to be requeued: it is, at SIGUSR1.")
        environment = SLURMEnvironment()
    return environment if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None
