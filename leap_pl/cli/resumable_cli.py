"""LightningCLI whose settings may be those of a checkpoint: what is not typed is taken from the run that it resumes."""

import os
import sys
from argparse import ArgumentError
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from leap_pl.base_model.place import check_trusted
from leap_pl.checkpoints.class_spec import same
from leap_pl.checkpoints.identity import read_identity
from leap_pl.checkpoints.layout import load_checkpoint
from leap_pl.checkpoints.run_folder import check_finished, check_settings, replaces
from leap_pl.checkpoints.settings import CODE_OF
from leap_pl.cli.arguments import check_classes, check_groups, options_of, parser_message, plain
from leap_pl.cli.configs import check_configs, check_keys, setting_of
from leap_pl.cli.former_spelling import FORMER, FormerSpellingParser, advice, respelled
from leap_pl.cli.overruled import overruled
from leap_pl.cli.resume import check_verb, checkpoint_path, find_last, settings_of
from leap_pl.cli.sentences import RunFormatter
from leap_pl.cli.token_budget import take_tokens
from leap_pl.errors import UserError
from leap_pl.escape import say
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.ranges import check_numbers
from leap_pl.inputs.register import running_verb
from leap_pl.training.fixed_mask import FixedMask
from leap_pl.training.run_settings import computed_in

# Settings that are paths, or names that are read as such.
PATHS = (
    "ckpt_path",
    "checkpoint.dirpath",
    "mask_export.folder",
    "model.base_model",
    "model.mask",
    "model.weights",
    "model.prior.mask",
    "data.text",
    "data.validation_text",
    "trainer.default_root_dir",
)


class LeapParser(FormerSpellingParser, LightningArgumentParser):
    """LightningCLI's parser, which also reads former spellings of settings.

    Attributes:
        verb: Verb whose options it parses; None: it parses the verb itself.
    """

    def __init__(self, *args: Any, verb: str | None = None, **kwargs: Any) -> None:
        """Create a parser for ``verb`` with the arguments of LightningCLI's parser."""
        super().__init__(*args, formatter_class=RunFormatter, **kwargs)
        self.verb = verb


class ResumableCLI(LightningCLI):
    """LightningCLI that resumes with the settings of a checkpoint, and that reads former spellings of settings.

    Attributes:
        name: Name of the verb that runs ``fit``.
        fixes: Whether that verb leaves the mask as it is.
        parsers: Verb → its parser, and None → the parser of the verb itself.
        force: Whether to replace an earlier run.
        last: Whether to resume from the last checkpoint, if there is one.
    """

    name, fixes = "fit", False
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
        for line in overruled(words, configs):
            rank_zero_warn(line)
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
        empty = [name for name in PATHS if settings.get(name) == ""]
        if empty:  # of a variable that is not set, in a script: a path of no characters is the working directory
            raise UserError(f"--{empty[0]} is empty. Give it a value, or leave it out.")
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

    def check_typed(self, words: list[str]) -> None:
        """Check the ``words`` of the command line, before they are parsed; by default all are allowed."""

    def check_kind(self, settings: Any) -> None:
        """Check that the ``settings`` of a fit are of the verb that is typed; by default all are."""

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
            raise UserError(parser_message(error, options_of(known))) from error

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
        mask = setting_of(words, self._configs, "model.mask")
        if mask is not None:  # before its sparsity and its weights are compared with those that the run had
            FixedMask.read(mask).check_same(identity)
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
        if settings.get("model.trust_remote_code"):
            names = [f"model.{name}" for name in CODE_OF]
            of_file = [name for name in names if setting_of(self._words, self._configs, name) is None]
            check_trusted({f"--{name}": settings.get(name) for name in of_file})
        typed = {word.partition("=")[0] for word in self._words}
        if "--seed_everything" in typed and not typed & {"--model.seed", "--data.seed"}:
            rank_zero_warn(
                "--seed_everything does not change what is learned. Give --model.seed for other noise, or --data.seed "
                "for another order of the text."
            )
        if verb == "fit":
            self.check_kind(settings)
            settings.force = False  # so that a saved config, used again, does not replace the run that saved it
            # On every rank, as everything that is refused: the others would wait for a rank that has ended.
            check_settings(settings, force=self.force, last=self.last)
