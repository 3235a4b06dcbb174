"""Command line of fit and validate: LightningCLI with this project's defaults."""

import os
import sys
from argparse import SUPPRESS, ArgumentError
from pathlib import Path
from typing import Any, ClassVar

from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from leap_pl.callbacks import (
    Checkpoints,
    MaskExport,
    ProcessSettings,
    RunReport,
    SparsityLogger,
    StepProgress,
    ValidationTimes,
)
from leap_pl.checkpoints.class_spec import same
from leap_pl.checkpoints.file import WholeCheckpointIO
from leap_pl.checkpoints.folder import check_folder_of
from leap_pl.checkpoints.identity import read_identity
from leap_pl.checkpoints.layout import load_checkpoint
from leap_pl.checkpoints.run_folder import Finished, check_finished, check_settings, replaces
from leap_pl.cli.arguments import (
    check_classes,
    check_configs,
    check_groups,
    check_keys,
    one_line,
    options_of,
    plain,
    setting_of,
    with_recipes,
)
from leap_pl.cli.former_spelling import FORMER, FormerSpellingParser, advice, respelled
from leap_pl.cli.process import set_up_process
from leap_pl.cli.resume import check_verb, checkpoint_path, find_last, settings_of
from leap_pl.cli.run_errors import errors_of_run, package_in, refusal
from leap_pl.cli.sentences import RunFormatter
from leap_pl.cli.token_budget import take_tokens
from leap_pl.cli.trainer import TRAINER_DEFAULTS, ConfigOfFit, check_trainer
from leap_pl.errors import UserError, listing
from leap_pl.escape import say
from leap_pl.gates import FixedGate
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.ranges import check_numbers
from leap_pl.inputs.register import running_verb
from leap_pl.training.datamodule import TextDataModule
from leap_pl.training.module import LeapModule
from leap_pl.training.run_settings import computed_in

# LeapModule's default, in a form that can be saved in a config.
OPTIMIZER: dict[str, Any] = {
    "class_path": "torch.optim.AdamW",
    "init_args": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.0, "fused": True},
}


class LeapParser(FormerSpellingParser, LightningArgumentParser):
    """LightningCLI's parser, which also reads former spellings of settings.

    Attributes:
        verb: Verb whose options it parses; None: it parses the verb itself.
    """

    def __init__(self, *args: Any, verb: str | None = None, **kwargs: Any) -> None:
        """Create a parser for ``verb`` with the arguments of LightningCLI's parser."""
        super().__init__(*args, formatter_class=RunFormatter, **kwargs)
        self.verb = verb


class LeapCLI(LightningCLI):
    """LightningCLI with the callbacks of every run, and one tokenizer for model and data.

    Attributes:
        name: Name of the verb that runs ``fit``.
        fixes: Whether that verb leaves the mask as it is.
        defaults: Defaults of that verb that differ from the module's: name of a setting → value.
        parsers: Verb → its parser, and None → the parser of the verb itself.
        force: Whether to replace an earlier run.
        last: Whether to resume from the last checkpoint, if there is one.
    """

    name, fixes = "fit", False
    defaults: ClassVar[dict[str, Any]] = {"model.optimizer": OPTIMIZER}
    force = last = False
    _resumes_from: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Parse the command line and run its verb, with the arguments of LightningCLI."""
        self.parsers: dict[str | None, LeapParser] = {}
        super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Create a parser and register it in ``parsers``."""
        parser = super().init_parser(**kwargs)
        assert isinstance(parser, LeapParser)
        self.parsers[parser.verb] = parser
        return parser

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

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse ``args``; settings that are not given are taken from the checkpoint to resume from.

        ``--ckpt_path last`` becomes the newest intact checkpoint in ``checkpoint.dirpath``, or None if there is none
        yet. A job that SLURM has requeued resumes from it automatically.
        """
        words = [str(word) for word in (args if isinstance(args, list) else sys.argv[1:])]
        for verb, own in self.parsers.items():
            own.prog = "leap_pl" if verb is None else f"leap_pl {self.name if verb == 'fit' else verb}"  # for the usage
        self._last_of: dict[str | None, tuple[str, tuple[Path, dict[str, Any]] | None]] = {}
        self._configs = configs = check_configs(words)
        words, typed = respelled(words)
        self.check_typed(words)
        if configs:
            known = self.parsers.get(words[0] if words else None, parser)
            check_keys(configs, [*options_of(known), f"--{FORMER}"])
        self._words = words
        args = words if typed else args
        path = setting_of(words, configs, "ckpt_path")
        refused: dict[str, UserError] = {}
        if path is not None and expanded(path).exists():
            refused = self._take_settings(words[0], load_checkpoint(path), path, words)
        elif path == "last" and words[0] in self.parsers:  # settings that it has need not be typed
            refused = self._take_last(words, setting_of(words, configs, "checkpoint.dirpath"))
        self._parse(parser, args, words)
        self._warn_of_former(typed)
        verb = self.config.get("subcommand")
        if verb is None:
            check_numbers(self.config.as_dict())
            check_groups(self.config, parser.get_defaults())
            check_classes(self.config)
            return
        settings = self.config[verb]
        if verb == "fit":
            take_tokens(settings, words, configs)
        if settings.ckpt_path != path:
            raise UserError(f"ckpt_path is {settings.ckpt_path} and {path}. Give it once, as --ckpt_path PATH.")
        settings.ckpt_path = path = checkpoint_path(path)
        if verb == "validate" and path is None:
            raise UserError(
                "leap_pl validate measures the mask in a checkpoint of a run. Name it with --ckpt_path FILE, or take "
                "the newest in --checkpoint.dirpath: --ckpt_path last."
            )
        requeued = verb == "fit" and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
        if verb == "fit":
            self.force = replaces(settings, requeued=requeued)
        restarted = requeued and not self.force
        self.last = path == "last" or (restarted and settings.checkpoint.dirpath is not None)
        if restarted and path is None and not self.last:
            rank_zero_warn(
                "SLURM has started this job again, and --checkpoint.dirpath names no folder: a new run starts."
            )
        if self.last:
            found = self._parse_for_last(verb, parser, args, words)
            refused = refused if found is None else found
        self._check_settings(verb, refused)
        settings = self.config[verb]
        self._last_of.clear()  # its tensors are mapped, and would keep a file that is removed during the run
        # LightningCLI would override typed settings by the checkpoint's: it must not see the path yet.
        self._resumes_from, settings.ckpt_path = settings.ckpt_path, None

    def before_instantiate_classes(self) -> None:
        """Restore the path of the checkpoint, which :meth:`parse_arguments` has removed."""
        if self.subcommand is not None:
            self.config[self.subcommand].ckpt_path = self._resumes_from

    def instantiate_classes(self) -> None:
        """Create the module, the data module and the trainer.

        Raises:
            UserError: A class refuses its settings.
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

    def _warn_of_former(self, typed: list[str]) -> None:
        """Warn once of former spellings, ``typed`` or in configs, and say what to write instead."""
        former = [*typed, *(name for parser in self.parsers.values() for name in parser.former)]
        if former:
            rank_zero_warn(advice(former))

    def _parse(self, parser: LightningArgumentParser, args: ArgsType, words: list[str]) -> None:
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            known = self.parsers.get(words[0] if words else None, parser)
            raise UserError(one_line(error, options_of(known))) from error

    def _take_last(self, words: list[str], folder: str | None) -> dict[str, UserError]:
        """Take the settings of the newest checkpoint in ``folder``, which ``words`` or their configs name, if any.

        Raises:
            UserError: There is no checkpoint to validate.
        """
        newest = None if folder is None else self._find_last(words[0], folder)[1]
        return {} if newest is None else self._take_settings(words[0], newest[1], str(newest[0]), words)

    def _find_last(self, verb: str, folder: str | None) -> tuple[str, tuple[Path, dict[str, Any]] | None]:
        """Return what :func:`find_last` does, whose reading of every bit takes a while, once for a folder."""
        if folder not in self._last_of:
            self._last_of[folder] = find_last(verb, folder)
        return self._last_of[folder]

    def _parse_for_last(
        self, verb: str, parser: LightningArgumentParser, args: ArgsType, words: list[str]
    ) -> dict[str, UserError] | None:
        """Parse again with the settings of the newest checkpoint in ``checkpoint.dirpath``, and resume from it.

        Returns:
            None if there is no checkpoint yet; else as :meth:`_take_settings`.
        """
        typed = self.config[verb].ckpt_path
        refused: dict[str, UserError] | None = None
        message, newest = self._find_last(verb, self.config[verb].checkpoint.dirpath)
        if newest is not None:
            refused = self._take_settings(verb, newest[1], str(newest[0]), words)
            self._parse(parser, args, words)
            if verb == "fit":
                take_tokens(self.config[verb], words, self._configs)
                check_finished(self.config[verb], *newest)
            self.config[verb].ckpt_path = str(newest[0])
        elif typed == "last":
            self.config[verb].ckpt_path = None
        rank_zero_only(say)(f"leap_pl {running_verb()}: {message}", sys.stderr)
        return refused

    def _take_settings(
        self, verb: str, checkpoint: dict[str, Any], path: str, words: list[str]
    ) -> dict[str, UserError]:
        """Set the settings that ``checkpoint`` was learned with as defaults of the parser.

        Returns:
            Name of each setting that cannot be taken → the error to raise unless the setting is typed.

        Raises:
            UserError: The checkpoint is of another verb.
        """
        identity = read_identity(checkpoint, path)
        if verb == "fit":
            check_verb(identity, path, self.name, fixes=self.fixes)
        base_model = setting_of(words, self._configs, "model.base_model")
        settings, refused = settings_of(identity, checkpoint, path, words, base_model)
        if verb != "fit":  # validation has its own precision, and no steps
            settings = {name: value for name, value in settings.items() if not name.startswith("trainer.")}
            settings["model.dtype"] = computed_in(identity) or settings.get("model.dtype", "auto")
        self.parsers[verb].set_defaults(settings)
        return refused

    def _check_settings(self, verb: str, refused: dict[str, UserError]) -> None:
        """Check the settings of ``verb``, of which those in ``refused`` must be typed; see :meth:`_take_settings`.

        Raises:
            UserError: A setting is wrong, or a run in the same folder would be overwritten.
        """
        settings, defaults = self.config[verb], self.parsers[verb].get_defaults()
        check_numbers(settings.as_dict())
        check_groups(settings, defaults)
        for name, error in refused.items():
            if same(plain(settings.get(name)), plain(self.parsers[verb].get_default(name))):  # not typed
                raise error
        check_classes(settings)
        typed = {word.partition("=")[0] for word in self._words}
        if "--seed_everything" in typed and not typed & {"--model.seed", "--data.seed"}:
            rank_zero_warn(
                "--seed_everything does not change what is learned. Give --model.seed for other noise, or --data.seed "
                "for another order of the text."
            )
        if verb == "fit":
            self.check_kind(settings)
            settings.force = False  # so that a saved config, used again, does not replace the run that saved it
            rank_zero_only(check_settings)(settings, force=self.force, last=self.last)

    def before_fit(self) -> None:
        """Pass the checkpoint to resume from to the model, and compare its settings, before ranks are started."""
        path = self.config_init[self.subcommand].ckpt_path
        if path is None or not Path(path).exists():
            return
        self.model.resumes_from = path
        checkpoint = load_checkpoint(path, check_tensors=False)  # the tensors were checked when the settings were taken
        self.model.check_resume(checkpoint, path, self.trainer, self.datamodule, fitting=self.subcommand == "fit")
        check_folder_of(path, self.trainer.strategy)

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
        if asked.enable_progress_bar is False:
            self.parsers[verb].callback_keys.remove("progress")
        self.trainer_defaults["callbacks"].append(ValidationTimes(spread=asked.val_check_interval is None))
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except TypeError as error:
            if "devices" not in str(error):
                raise
            raise UserError(f"trainer.devices: {' '.join(str(error).split())} Give a number of devices.") from error
        check_trainer(trainer)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.force, callback.last = self.force, self.last
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        return trainer


def is_fixed(settings: Any) -> bool:
    """Return whether the gate in the settings of a run is a FixedGate."""
    path = settings.get("model.gate.class_path") or getattr(settings.get("model.gate"), "__name__", "")
    return str(path).rpartition(".")[2] == FixedGate.__name__


def make_cli(words: list[str], *, run: bool = True, kind: type[LeapCLI] = LeapCLI) -> LeapCLI:
    """Parse ``words`` and create trainer, module and data module; with ``run``, the first word is the verb to run."""
    # No abbreviated options: --ckpt_path must be found before the rest is parsed.
    settings = {"exit_on_error": False, "allow_abbrev": False}
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
