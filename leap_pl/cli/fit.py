"""Command line of fit and validate: LightningCLI with this project's defaults."""

import sys
from argparse import SUPPRESS
from pathlib import Path
from typing import Any, ClassVar

from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from leap_pl.callbacks import (
    Checkpoints,
    MaskExport,
    ProcessSettings,
    RunReport,
    SparsityLogger,
    StepProgress,
    ValidationTimes,
)
from leap_pl.callbacks.lightning_internals import found_by_lightning
from leap_pl.checkpoints.file import write_whole
from leap_pl.checkpoints.folder import check_folder_of
from leap_pl.checkpoints.layout import load_checkpoint
from leap_pl.checkpoints.run_folder import Finished
from leap_pl.cli.configs import with_recipes
from leap_pl.cli.idle_settings import check_idle
from leap_pl.cli.process import set_up_process
from leap_pl.cli.resumable_cli import LeapParser, ResumableCLI
from leap_pl.cli.run_errors import errors_of_run, package_in, refusal
from leap_pl.cli.trainer import TRAINER_DEFAULTS, ConfigOfFit, check_trainer
from leap_pl.errors import UserError, listing, one_line
from leap_pl.escape import say
from leap_pl.gates import FixedGate
from leap_pl.inputs.register import running_verb
from leap_pl.training.datamodule import TextDataModule
from leap_pl.training.module import LeapModule

# LeapModule's default, in a form that can be saved in a config.
OPTIMIZER: dict[str, Any] = {
    "class_path": "torch.optim.AdamW",
    "init_args": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.0, "fused": True},
}


class LeapCLI(ResumableCLI):
    """LightningCLI with the callbacks of every run, and one tokenizer for model and data.

    Attributes:
        defaults: Defaults of its verb that differ from the module's: name of a setting → value.
    """

    defaults: ClassVar[dict[str, Any]] = {"model.optimizer": OPTIMIZER}

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's ``fit`` and ``validate``; ``leap_pl evaluate`` covers its other verbs."""
        return {verb: skipped for verb, skipped in LightningCLI.subcommands().items() if verb in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the callbacks, each group under its own name, and of ``fit``."""
        parser.add_lightning_class_args(SparsityLogger, "sparsity_log")
        parser.add_lightning_class_args(MaskExport, "mask_export")
        parser.add_lightning_class_args(StepProgress, "progress")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.set_defaults(self.defaults)
        parser.link_arguments("model.base_model", "data.tokenizer")
        parser.link_arguments("model.revision", "data.tokenizer_revision")
        fits = parser is self.parsers.get("fit")
        parser.add_argument(  # validate takes the config of a run, which has both, and needs neither
            "--force",
            action="store_true",
            help="Replace an earlier run in checkpoint.dirpath: its checkpoints, its prior and its mask."
            if fits
            else SUPPRESS,
        )
        parser.add_argument(
            "--tokens",
            type=str | int | float | None,  # a config may have a plain number
            help="Number of tokens to learn on, as in 10M, which sets trainer.max_steps." if fits else SUPPRESS,
        )

    def instantiate_classes(self) -> None:
        """Create the module, the data module and the trainer.

        Raises:
            UserError: A class refuses its settings, or one that is typed does not act.
        """
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except ModuleNotFoundError as error:  # of a logger or a device whose package is optional
            if package_in(error) is None:
                raise
            raise refusal(error) from error
        except (ValueError, MisconfigurationException) as error:
            raise refusal(error) from error
        if self.subcommand == "fit":
            check_idle(self.config.fit, self.parsers["fit"].get_defaults(), fixes=self.fixes)

    def check_typed(self, words: list[str]) -> None:
        """Check that no option that the verb does not use is typed; a config of a run may give all of them.

        Raises:
            UserError: One is.
        """
        typed = {word.partition("=")[0] for word in words}
        idle = sorted(typed & {"--force", "--tokens"}) if words[:1] == ["validate"] else []
        if idle:
            raise UserError(f"{listing(idle)}: leap_pl validate learns nothing. Leave out what is for leap_pl fit.")

    def check_kind(self, settings: Any) -> None:
        """Check that the settings of a run do not fix the mask, which is for another verb.

        Raises:
            UserError: They do.
        """
        if settings.get("model.mask") is not None or is_fixed(settings):
            raise UserError(
                "leap_pl fit learns a mask, and model.mask or model.gate FixedGate leaves one as it is. To train the "
                "weights that a mask keeps, type leap_pl recover; to start learning from a mask, --model.prior.mask."
            )

    def before_fit(self) -> None:
        """Pass the checkpoint to resume from to the model, and compare its settings, before ranks are started."""
        path = self.config_init[self.subcommand].ckpt_path
        if path is None and self.subcommand == "fit":
            self._check_nothing_is_found()
        if path is None or not Path(path).exists():
            return
        self.model.resumes_from = path
        checkpoint = load_checkpoint(path, check_tensors=False)  # the tensors were checked when the settings were taken
        self.model.check_resume(checkpoint, path, self.trainer, self.datamodule, fitting=self.subcommand == "fit")
        check_folder_of(path, self.trainer.strategy)

    def _check_nothing_is_found(self) -> None:
        """Check that Lightning resumes from no checkpoint by itself, as it does with OnExceptionCheckpoint.

        Raises:
            UserError: It would.
        """
        there = found_by_lightning(self.trainer)
        if there is not None:
            raise UserError(
                f"OnExceptionCheckpoint of trainer.callbacks resumes from {there} by itself, and no --ckpt_path was "
                f"typed. To resume, add --ckpt_path {there}; for a new run leave that callback out: checkpoints are "
                "saved at signals and intervals without it."
            )

    def before_validate(self) -> None:
        """Do the same for a validation, and refuse one that would measure nothing."""
        self.before_fit()
        sequences, batches = self.datamodule.validation_sequences, self.trainer.limit_val_batches
        if not sequences or not batches:
            off = "data.validation_sequences is 0" if not sequences else "trainer.limit_val_batches is 0"
            raise UserError(
                f"{off}, so that nothing would be measured. Add --data.validation_sequences 64, and where the run has "
                "held out no text --data.validation_text FILE.jsonl; or leave --trainer.limit_val_batches out."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the trainer; its checkpoint files are atomic and verified, unless another checkpoint IO was chosen."""
        verb = self.subcommand
        asked = (self.config_init if verb is None else self.config_init[verb]).trainer
        given = asked.callbacks if isinstance(asked.callbacks, list) else [asked.callbacks]
        if asked.enable_progress_bar is False or any(isinstance(one, ProgressBar) for one in given):
            self.parsers[verb].callback_keys.remove("progress")
        self.trainer_defaults["callbacks"].append(ValidationTimes(spread=asked.val_check_interval is None))
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except TypeError as error:
            if "devices" not in str(error):
                raise
            raise UserError(f"trainer.devices: {one_line(error)} Give a number of devices.") from error
        except RuntimeError as error:
            if "stateful callback" not in str(error):
                raise
            raise UserError(
                f"trainer.callbacks has one that the run has already ({one_line(error)}) Leave it out, and set the "
                "run's own: --checkpoint.*, --sparsity_log.*, --mask_export.*; see leap_pl fit --help."
            ) from error
        check_trainer(trainer)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.force, callback.last = self.force, self.last
        write_whole(trainer)
        return trainer


def is_fixed(settings: Any) -> bool:
    """Return whether the gate in the settings of a run is a FixedGate."""
    path = settings.get("model.gate.class_path") or getattr(settings.get("model.gate"), "__name__", "")
    return str(path).rpartition(".")[2] == FixedGate.__name__


def _of_verb(kind: type[LeapCLI], verb: str) -> type[LeapCLI]:
    """Return ``kind`` with one verb: the parser of another, which is not typed, would take as long to build."""
    skipped = kind.subcommands()[verb]
    return type(kind.__name__, (kind,), {"subcommands": staticmethod(lambda: {verb: skipped})})


def make_cli(words: list[str], *, run: bool = True, kind: type[LeapCLI] = LeapCLI) -> LeapCLI:
    """Parse ``words`` and create trainer, module and data module; with ``run``, the first word is the verb to run."""
    # No abbreviated options: --ckpt_path must be found before the rest is parsed.
    settings = {"exit_on_error": False, "allow_abbrev": False}
    if run and words and words[0] in kind.subcommands():
        kind = _of_verb(kind, words[0])
    verbs: dict[str, Any] = {verb: {**settings, "verb": verb} for verb in kind.subcommands()} if run else {}
    return kind(
        LeapModule,
        TextDataModule,
        args=with_recipes(words),
        run=run,
        seed_everything_default=0,
        trainer_defaults={**TRAINER_DEFAULTS, "callbacks": [ProcessSettings(), RunReport()]},
        parser_class=LeapParser,
        auto_configure_optimizers=False,
        save_config_callback=ConfigOfFit,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "leap_pl", **settings, **verbs},
    )


def run(words: list[str], kind: type[LeapCLI] = LeapCLI) -> LeapCLI | None:
    """Run one of LightningCLI's verbs; return None if the run was already finished.

    Args:
        words: Verb and options.
        kind: Class of the command line.

    Raises:
        UserError: Settings contradict each other, or something that they name does not exist.
    """
    set_up_process()
    try:
        with errors_of_run():
            return make_cli(words, kind=kind)
    except Finished as done:
        rank_zero_only(say)(f"leap_pl {running_verb()}: {done}", sys.stderr)
        return None
    except SystemExit as end:  # Lightning ends the process with status 1 at a Ctrl-C that no checkpoint answers
        if type(end) is SystemExit and isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
