"""The trainer of fit: its defaults, the config that it saves, and what is refused."""

import os
from pathlib import Path
from typing import Any

from jsonargparse import lazy_instance
from lightning import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from leap_pl.callbacks.mask_export import mask_place
from leap_pl.errors import UserError
from leap_pl.files import atomic_file
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.register import current, real_place
from leap_pl.training import trainer_checks

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_steps": 2000,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": -1,  # validate once on the whole text before training: the first point of the curves
    "log_every_n_steps": 10,
    "enable_model_summary": False,  # the summary counts parametrized weights twice
    "check_val_every_n_epoch": None,  # a run is one epoch, and validation is scheduled by steps
    "logger": lazy_instance(TensorBoardLogger, save_dir="runs", name="leap", default_hp_metric=False),
}

CONFIG = "config-of-run.yaml"  # beside the mask; a config.yaml there may be the user's own

PROCESSES_A_CORE = 8  # more processes on a CPU are certainly a mistake, and use up the machine's memory


class ConfigOfFit(SaveConfigCallback):
    """Save the config with the logs of ``fit``, and never in the working directory."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the config, if this is ``fit`` and has a logger with a folder of the run."""
        if stage == "fit" and trainer.loggers:
            if "ckpt_path" in self.config:  # used again, a config starts a run of its own
                self.config = self.config.clone()
                self.config.ckpt_path = None
            if isinstance(trainer.loggers[0], TensorBoardLogger | CSVLogger):
                self._take_name(expanded(str(trainer.log_dir)))
                super().setup(trainer, pl_module, stage)

    def _take_name(self, folder: Path) -> None:
        """Save the config under another name in ``folder`` where a file of its usual one is read by this run."""
        register = current()
        file = folder / self.config_filename
        if register is None or self.already_saved:
            return
        try:
            register.check_file(real_place(file), file)
        except UserError:
            self.config_filename = CONFIG
            register.check_file(real_place(folder / CONFIG), folder / CONFIG)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the config beside the mask, where the loggers have no folder, or one that several runs share."""
        if not trainer.loggers or self.already_saved:
            return
        folder = mask_place(trainer)
        if trainer.is_global_zero and folder.resolve() != Path.cwd():
            with atomic_file(folder / CONFIG, own=True) as temporary:
                temporary.write_text(self.parser.dump(self.config, skip_none=False), encoding="utf-8")
        self.already_saved = True


def check_trainer(trainer: Trainer) -> None:
    """Refuse settings that Lightning accepts, but that would learn nothing or exhaust the machine.

    Raises:
        UserError: A setting does.
    """
    trainer_checks.check_trainer(trainer)
    cores = os.cpu_count() or 1
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > PROCESSES_A_CORE * cores:
        raise UserError(
            f"trainer.devices is {trainer.num_devices}, which would start as many processes, each with the model, on "
            f"{cores} CPU cores. Give at most {PROCESSES_A_CORE * cores}."
        )
