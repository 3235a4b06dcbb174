"""Private interfaces of Lightning: how ModelCheckpoint saves, and when the training loop validates.

No other module of the callbacks uses private interfaces of Lightning. If a version of it lacks one, the run falls back
to public interfaces and warns once of what is missing.
"""

import math
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from leap_pl.checkpoints.layout import LAST
from leap_pl.checkpoints.run_folder import link_last
from leap_pl.errors import warn_once
from leap_pl.files import atomic_file, atomic_folder, atomic_link
from leap_pl.inputs.register import real_path

_METHODS = (
    "_link_checkpoint",
    "_monitor_candidates",
    "_save_checkpoint",
    "_save_last_checkpoint",
    "_save_topk_checkpoint",
    "_should_remove_checkpoint",
    "_should_skip_saving_checkpoint",
)
_STATE = ("_defer_save_until_validation", "_last_checkpoint_saved", "_last_global_step_saved")


class SavingCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that also saves on request, and whose writes a subclass can override.

    If Lightning's ModelCheckpoint lacks the methods used here, it writes its regular checkpoints itself, and requested
    ones are written in addition, each named by its step.

    Attributes:
        saved_step: Optimizer step of the newest checkpoint that this object wrote; 0 if there is none.
        saved_path: Path of that checkpoint; empty if there is none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Create the callback with the arguments of ModelCheckpoint."""
        super().__init__(*args, **kwargs)
        self.saved_step, self.saved_path = 0, ""
        missing = [name for name in _METHODS if not hasattr(ModelCheckpoint, name)]
        missing += [name for name in _STATE if not hasattr(self, name)]
        self._known = not missing
        if missing:
            warn_once(
                f"this version of Lightning saves differently (ModelCheckpoint has no {', '.join(missing)}): "
                "checkpoints at signals, at time intervals and at the end are written in addition to its own, and are "
                "never removed."
            )

    def save(self, trainer: L.Trainer) -> None:
        """Write a checkpoint of the last optimizer step, unless it is already written."""
        if not self._known:
            self._save_in_public(trainer)
            return
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor in candidates:
            self._save_topk_checkpoint(trainer, candidates)
        else:
            self._defer_save_until_validation = True
        if self.save_last == "link" and self.saved_step != trainer.global_step:
            # It is not among the best of the monitored metric, but the newest checkpoint is always saved.
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
        """Record ``path`` as the newest checkpoint, at the optimizer step ``step``."""
        self.saved_step, self.saved_path = step, path
        self._last_global_step_saved, self._last_checkpoint_saved = step, path

    def forget(self) -> None:
        """Forget the checkpoints of an earlier run, which this object may have written."""
        self.note_saved(0, "")
        self.best_k_models, self.kth_best_model_path, self.best_model_path = {}, "", ""
        self.kth_value, self.best_model_score, self.current_score = None, None, None  # type: ignore[assignment]

    def _save_in_public(self, trainer: L.Trainer) -> None:
        learning = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not learning or self.saved_step == trainer.global_step:
            return
        metrics = {**trainer.callback_metrics, "step": torch.tensor(trainer.global_step, device="cpu")}
        path = self.format_checkpoint_name({**metrics, "epoch": torch.tensor(trainer.current_epoch, device="cpu")})
        self.write(trainer, path)
        if self.save_last == "link" and trainer.is_global_zero:
            link_last(Path(path).parent, Path(path))

    def reset_scores(self) -> None:
        """Count all checkpoints of before as worse than any that follows: they were measured on something else."""
        worst = torch.tensor(math.inf if self.mode == "min" else -math.inf, device="cpu")
        self.best_k_models = dict.fromkeys(self.best_k_models, worst)
        if self.best_k_models:
            self.kth_value = self.best_model_score = worst

    def drop_surplus(self) -> list[str]:
        """Count no more checkpoints than ``save_top_k``, and return the paths of the worse ones, still on the disk.

        A run that resumes with fewer has those of more in its state: Lightning removes one only where it has exactly as
        many, and would remove none ever after.
        """
        worst = max if self.mode == "min" else min
        dropped = []
        while 0 < self.save_top_k < len(self.best_k_models):
            dropped.append(worst(self.best_k_models, key=self.best_k_models.__getitem__))
            del self.best_k_models[dropped[-1]]
        if dropped:
            self.kth_best_model_path = worst(self.best_k_models, key=self.best_k_models.__getitem__)
            self.kth_value = self.best_k_models[self.kth_best_model_path]
        return dropped

    def remove(self, trainer: L.Trainer, paths: list[str], current: str) -> None:
        """Remove the checkpoints ``paths``, after ``current`` was written."""
        for path in paths:
            if self._known and self._should_remove_checkpoint(trainer, path, current):
                self._remove_checkpoint(trainer, path)

    @property
    def waits(self) -> bool:
        """Return whether a checkpoint is due that waits for the monitored metric."""
        return bool(getattr(self, "_defer_save_until_validation", False))

    @waits.setter
    def waits(self, value: bool) -> None:
        self._defer_save_until_validation = value

    def is_measured(self, trainer: L.Trainer) -> bool:
        """Return whether the monitored metric is of the current step; a subclass may know better."""
        return True

    # Methods that ModelCheckpoint calls.

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, torch.Tensor]) -> None:
        """Write the checkpoint if it is among the best; unless all are kept, one that was not measured waits."""
        if self.save_top_k <= 0 or self.is_measured(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)
            return
        self._defer_save_until_validation = True  # by which a checkpoint is due: the next one competes
        if self.save_last == "link" and self.saved_step != trainer.global_step:
            self._save_checkpoint(trainer, self.format_checkpoint_name(monitor_candidates, self.CHECKPOINT_NAME_LAST))

    def _should_skip_saving_checkpoint(self, trainer: L.Trainer) -> bool:
        """Return whether nothing is to be saved; a step that was written, and only now is measured, may be the best."""
        saved = self._last_global_step_saved
        if self._defer_save_until_validation and self.is_measured(trainer):
            self._last_global_step_saved = -1
        try:
            return super()._should_skip_saving_checkpoint(trainer)
        finally:
            self._last_global_step_saved = saved

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        self.write(trainer, filepath)

    @staticmethod
    def _link_checkpoint(trainer: L.Trainer, filepath: str, linkpath: str) -> None:
        """Replace the link atomically; Lightning's own method removes the old link first."""
        if trainer.is_global_zero and Path(filepath) != Path(linkpath):
            try:
                atomic_link(Path(linkpath), Path(filepath))
            except OSError:  # a file system without links
                _copy(Path(filepath), Path(linkpath))
        trainer.strategy.barrier()

    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        """Return whether to remove ``previous``, even if it is the checkpoint that the run resumed from."""
        return previous != current and self._lies_here(previous)

    def _lies_here(self, path: str) -> bool:
        """Return whether ``path`` names a checkpoint in the run's own folder; whatever else it leads to is not ours."""
        named = Path(path)
        known = self.dirpath is not None and named.suffix == self.FILE_EXTENSION
        return known and real_path(named.parent) == real_path(str(self.dirpath))

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Remove a checkpoint; the link to the newest one leads to that before, so that it never dangles."""
        if self.save_last == "link" and trainer.is_global_zero and self.saved_path:
            link = Path(filepath).with_name(LAST)
            if link.is_symlink() and real_path(link) == real_path(filepath):
                link_last(link.parent, Path(self.saved_path))
        super()._remove_checkpoint(trainer, filepath)

    def own_paths(self, state: dict[str, Any], there: Collection[str] | None = None) -> dict[str, Any]:
        """Return Lightning's ``state`` with its paths as those of checkpoints of the same names in the run's folder.

        A checkpoint is data: it names files of this folder, and no others, which this object would remove.

        Args:
            state: State of a checkpoint.
            there: Names of what is in the folder; others do not count. None: they are not known.
        """

        def own(path: Any) -> str:
            name = Path(str(path)).name
            here = str(Path(str(self.dirpath)) / name)
            return here if path and self._lies_here(here) and (there is None or name in there) else ""

        best = {own(path): value for path, value in (state.get("best_k_models") or {}).items() if own(path)}
        last, kth = (own(state.get(key)) for key in ("last_model_path", "kth_best_model_path"))
        if best and kth not in best:
            kth = (max if self.mode == "min" else min)(best, key=best.__getitem__)
        found = {"dirpath": self.dirpath, "best_k_models": best, "last_model_path": last}
        found |= {"kth_best_model_path": kth, "best_model_path": own(state.get("best_model_path"))}
        return {**state, **found}


def _copy(checkpoint: Path, path: Path) -> None:
    """Replace ``path`` by a copy of ``checkpoint``, a file or a folder."""
    if checkpoint.is_dir():
        with atomic_folder(path, force=True, own=True, verb="fit") as folder:
            shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    else:
        with atomic_file(path, own=True) as file:
            shutil.copyfile(checkpoint, file)


def validate_at(trainer: L.Trainer, micro_batch: int) -> None:
    """Let Lightning validate after the ``micro_batch`` that begins, counted from 1, also where it goes by the clock."""
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        trainer._val_check_time_interval = None  # type: ignore[attr-defined]
    if trainer.check_val_every_n_epoch is None:  # Lightning counts those of all epochs
        micro_batch = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    trainer.val_check_batch = micro_batch


def ends_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Return whether the micro-batch ``batch_idx`` of its epoch ends an optimizer step, as far as is known before it.

    The last one of an epoch does, however few there were; of a text whose length is not known it is not foreseen.
    """
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or batch_idx + 1 == trainer.num_training_batches


def validate_if_due(trainer: L.Trainer) -> None:
    """Validate, if Lightning would have validated after the step at which the run was stopped."""
    loop = trainer.fit_loop.epoch_loop
    try:
        fetcher = trainer.fit_loop._data_fetcher
        due = fetcher is not None and loop._should_check_val_fx(fetcher)
    except AttributeError:
        warn_once(
            "this version of Lightning does not show whether a validation is due: a validation that was due when the "
            "run was stopped is skipped."
        )
        return
    if due:
        # Else Lightning would resume validation at the batch in the checkpoint, without the metrics of earlier batches.
        loop.val_loop.restarting = False
        trainer.validating = True
        loop.val_loop.run()
        trainer.training = True


def found_by_lightning(trainer: L.Trainer) -> Path | None:
    """Return the checkpoint that Lightning resumes from without being asked, as it does with OnExceptionCheckpoint."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    saving = [callback for callback in callbacks if isinstance(callback, OnExceptionCheckpoint)]
    found = [str(callback.ckpt_path) for callback in saving]
    for callback in trainer.checkpoint_callbacks if saving else ():
        if isinstance(callback, ModelCheckpoint) and hasattr(callback, "_find_last_checkpoints"):
            found += sorted(map(str, callback._find_last_checkpoints(trainer)))
    return next((Path(path) for path in found if Path(path).exists()), None)


def requeuing(trainer: L.Trainer) -> SLURMEnvironment | None:
    """Return the SLURM environment of a job with auto-requeue; None in other runs."""
    environment: Any
    try:
        environment = trainer._accelerator_connector.cluster_environment
    except AttributeError:
        if not SLURMEnvironment.detect():
            return None
        warn_once(
            "this version of Lightning does not show whether the job has auto-requeue: it is requeued at SIGUSR1."
        )
        environment = SLURMEnvironment()
    return environment if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None


def exchange_no_signals(trainer: L.Trainer) -> None:
    """Let Lightning not ask all ranks before each micro-batch for a SIGTERM that it has handled: it handles none.

    It waits for all devices, and :class:`.Checkpoints` exchanges signals on the host.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = _nothing


def _nothing() -> None:
    """Do nothing."""


def stops_at_the_end(callback: L.Callback) -> bool:
    """Return whether ``callback`` is an EarlyStopping that has decided to act at the end of an epoch, in its setup."""
    return isinstance(callback, EarlyStopping) and bool(callback._check_on_train_epoch_end)
