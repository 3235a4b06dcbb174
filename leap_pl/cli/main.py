"""Command line ``leap_pl``: the table of verbs, each a command or a run of the Lightning trainer."""

import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from leap_pl.errors import UserError, is_out_of_memory, out_of_memory
from leap_pl.escape import discard, give_up, say, terminal
from leap_pl.version import __version__

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from lightning.pytorch.cli import ArgsType


class Verb(NamedTuple):
    """Row of the table of verbs.

    Attributes:
        summary: Words for it in the usage.
        function: Module and name of its function, imported when the verb is used.
        run: Whether the function takes the words, and LightningCLI makes a run of the Trainer of them; the options of
            any other verb are the signature of its function.
        first_page: Module and name of the text that ``--help`` shows instead of all options of a run.
        several: Option with any number of values, which may also be given without the flag, as in
            ``leap_pl compare a.json b.json``.
    """

    summary: str
    function: str
    run: bool = False
    first_page: str | None = None
    several: str | None = None


VERBS = {
    "fit": Verb("learn a mask for a model", "leap_pl.cli.fit:run", run=True, first_page="leap_pl.cli.first_pages:FIT"),
    "recover": Verb(
        "train the weights that a mask keeps",
        "leap_pl.cli.recover:run",
        run=True,
        first_page="leap_pl.cli.first_pages:RECOVER",
    ),
    "validate": Verb("perplexity of a checkpoint's hard mask on the validation text", "leap_pl.cli.fit:run", run=True),
    "prune": Verb("make a mask in one shot, layer by layer, without learning", "leap_pl.cli.prune:prune_command"),
    "export": Verb("write a sparse Hugging Face checkpoint from a mask", "leap_pl.cli.export:export_command"),
    "evaluate": Verb("perplexity and zero-shot tasks of a model or mask", "leap_pl.cli.evaluate:evaluate_command"),
    "generate": Verb("continue a prompt, and show how fast", "leap_pl.cli.generate:generate_command"),
    "consolidate": Verb("convert a checkpoint folder to one file", "leap_pl.cli.consolidate:consolidate_command"),
    "compare": Verb("tables and pictures of several results", "leap_pl.cli.compare:compare_command", several="results"),
}

# Errors of a path that may not be looked at: of its rights, its length, its file system.
OF_A_PATH = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTCONN, errno.ESTALE, errno.EIO, errno.EHOSTDOWN}

ALL = "all"  # leap_pl fit --help all

USAGE = f"""usage: leap_pl <verb> [options]

Learn which weights of a large language model to keep (LEAP, arXiv 2605.17289).

verbs:
{chr(10).join(f"  {name:<11} {verb.summary}" for name, verb in VERBS.items())}

  leap_pl <verb> --help     options of a verb; of fit and recover those that most runs need, all with --help all
  leap_pl --version         {__version__}

from a model to a sparse checkpoint:
  leap_pl fit --config short --model.base_model HuggingFaceTB/SmolLM2-135M --checkpoint.dirpath run
  leap_pl export --ckpt_path run/last.ckpt --output_dir sparse-model
  leap_pl evaluate --model HuggingFaceTB/SmolLM2-135M --perplexity wikitext2 --seq_length 512 --output dense.json
  leap_pl evaluate --model sparse-model --perplexity wikitext2 --seq_length 512 --output sparse.json
  leap_pl compare dense.json sparse.json
"""


def main(args: "ArgsType" = None) -> Any:
    """Run ``leap_pl`` with ``args``, by default those of the process.

    A :class:`UserError` is printed as one line on standard error, with exit status 2; a warning of this package as one
    line.
    """
    words = [str(word) for word in (sys.argv[1:] if args is None else args)]
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return None
    if words[0] == "--version":
        print(f"leap_pl {__version__}")
        return None
    try:
        verb = VERBS.get(words[0])
        if verb is None:
            raise UserError(f"there is no verb {words[0]!r}. The verbs are {', '.join(VERBS)}; see leap_pl --help.")
        _check_working_directory()
        if _asks_for_help(words[1:]) and (verb.first_page or not verb.run):
            _show_help(words[0], verb)
            raise SystemExit(0)
        from leap_pl.cli.arguments import typed_options  # help does not wait for these
        from leap_pl.inputs.register import command_inputs

        with _plain_warnings(), command_inputs(words[0]) as register:
            register.typed = typed_options(words[1:])
            function = _find(verb.function)
            if verb.run:
                return function(words[:-1] if words[-2:] in (["-h", ALL], ["--help", ALL]) else words)
            return function(**settings_of(words[0], function, words[1:]))
    except UserError as error:
        say(f"leap_pl {words[0]}{_of_rank()}: {error}", sys.stderr)
        raise SystemExit(2) from None
    except (RuntimeError, MemoryError, OSError) as error:
        if is_out_of_memory(error):
            said = out_of_memory(error)
            other = ", or give --device cpu" if "on the device" in said else ""
            said = f"{said} Lower --batch_size or --seq_length where the verb has them{other}."
        elif isinstance(error, OSError) and error.filename is not None and error.errno in OF_A_PATH:
            said = f"{error.filename} may not be read or written ({error.strerror}). Name another path."
        else:
            raise
        say(f"leap_pl {words[0]}{_of_rank()}: {said}", sys.stderr)
        raise SystemExit(2) from None


def _asks_for_help(words: list[str]) -> bool:
    """Return whether ``words`` ask for help, and not for that on all options."""
    return any(word in ("-h", "--help") for word in words) and ALL not in words


def _show_help(name: str, verb: Verb) -> None:
    """Print the first page of a verb's help, or the help that its function makes."""
    if verb.first_page:
        say(_find(verb.first_page).rstrip("\n"), lines=True)
    else:
        _parser(name, _find(verb.function)).print_help()


def _check_working_directory() -> None:
    try:
        Path.cwd()
    except OSError as error:
        raise UserError("the working directory no longer exists. Change to another: cd ~") from error


def console() -> None:
    """Run ``leap_pl`` with the arguments of the process; the verb's return value is not used as exit status.

    Ctrl-C ends the process with one line and status 130.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this process
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # help, which argparse prints, in a locale that is not UTF-8
            stream.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # a file needs no redraws; read when tqdm is imported
    try:
        try:
            main()
        finally:
            _flush()
        return
    except BrokenPipeError:  # of another stream than the output, as in 2>&1 | head: what it did is not finished
        discard(sys.stderr)
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:
        pass
    # Outside the except block, so that everything the exception kept alive is closed: progress bars print nothing more.
    say(f"\n{terminal(' '.join(['leap_pl', *sys.argv[1:2]]))}: stopped.", sys.stderr, lines=True)
    raise SystemExit(130)


def _flush() -> None:
    """Write what is left of the output, which the interpreter does later, where its errors are nobody's."""
    try:
        sys.stdout.flush()
    except OSError as error:
        give_up(sys.stdout, error)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings of this package as ``warning: …``, without file and line; other warnings are unchanged."""
    shown, ours = warnings.showwarning, Path(__file__).parents[1]

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        # Lightning sets its own format when it is imported, which may happen within this context.
        form = warnings.formatwarning
        if Path(filename).is_relative_to(ours):
            warnings.formatwarning = _one_line
        try:
            shown(message, category, filename, lineno, file, line)
        finally:
            warnings.formatwarning = form

    warnings.showwarning = show
    try:
        yield
    finally:
        if warnings.showwarning is show:
            warnings.showwarning = shown


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"warning: {terminal(' '.join(str(message).split()))}\n"


def _of_rank() -> str:
    rank = _rank()
    return f" [rank {rank}]" if rank else ""


def _rank() -> int:
    """Return the rank of this process, also for errors before there is a trainer that knows it."""
    if "lightning" not in sys.modules:
        return 0
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    return getattr(rank_zero_only, "rank", None) or 0


def _find(place: str) -> Any:
    """Return an object by its module and name."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def settings_of(name: str, function: Callable[..., Any], words: list[str]) -> dict[str, Any]:
    """Parse ``words`` to keyword arguments of a verb's ``function``.

    The options come from its signature, their help from its docstring; ``--config`` also gives values.

    Raises:
        UserError: The words are not valid arguments of the function.
    """
    from argparse import ArgumentError
    from inspect import signature

    from leap_pl.cli.arguments import options_of, parser_message
    from leap_pl.cli.configs import check_configs, check_keys
    from leap_pl.cli.overruled import overruled
    from leap_pl.inputs.ranges import check_numbers

    parser = _parser(name, function)
    several = VERBS[name].several
    switches = {f"--{p.name}" for p in signature(function).parameters.values() if isinstance(p.default, bool)}
    if several:
        words = _gather(words, f"--{several}", switches)
    configs = check_configs(words)
    check_keys(configs, options_of(parser))
    for line in overruled(_spell_out(words, switches), configs):
        warnings.warn(line, stacklevel=2)
    words, paths = _paths_aside(_spell_out(words, switches))
    try:
        settings = parser.parse_args(words).as_dict()
    except ArgumentError as error:
        raise UserError(_paths_back(parser_message(error, options_of(parser)), paths)) from error
    settings = _paths_back(settings, paths)
    settings.pop("config", None)
    check_numbers(settings, f"{name}.", "--")
    empty = [option for option, value in settings.items() if value == ""]
    if empty:
        raise UserError(f"--{empty[0]} is empty. Give it a value, or leave it out.")
    return settings


def _parser(name: str, function: Callable[..., Any]) -> "ArgumentParser":
    from jsonargparse import ArgumentParser

    from leap_pl.cli.command import add_arguments
    from leap_pl.cli.sentences import SentenceFormatter

    several = VERBS[name].several
    parser = ArgumentParser(
        prog=f"leap_pl {name}",
        usage=f"leap_pl {name} {several} ... [options]" if several else None,
        description=(function.__doc__ or "").split("Args:")[0],
        formatter_class=SentenceFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with values for these options.")
    add_arguments(parser, function)
    return parser


def _gather(words: list[str], option: str, switches: set[str]) -> list[str]:
    """Convert bare words in any position to values of ``option``, in addition to those of its flag or a config."""
    flags: list[str] = []
    bare: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            bare.append(word)
        elif word == option and left and (not left[0].startswith(("-", "[")) or _is_path(left[0])):
            continue  # --results a b: its values are handled as bare words
        elif word.startswith(f"{option}=") and (not word.startswith(f"{option}=[") or _is_path(word)):
            bare.append(word.partition("=")[2])
        else:
            flags.append(word)
            alone = "=" in word or word in ("-h", "--help", "--print_config")
            if left and not alone and (word not in switches or left[0] in ("true", "false")):
                flags.append(left.pop(0))
    return flags + [spelling for value in bare for spelling in (f"{option}+", value)]


def _spell_out(words: list[str], switches: set[str]) -> list[str]:
    """Expand switches without a value: ``--force`` to ``--force true``."""
    spelled: list[str] = []
    for place, word in enumerate(words):
        following = words[place + 1] if place + 1 < len(words) else "--"
        spelled += [word, "true"] if word in switches and following.startswith("-") else [word]
    return spelled


def _is_path(word: str) -> bool:
    """Return whether a word, or the part after its ``=``, is an existing path."""
    from leap_pl.inputs.register import exists  # help does not wait for it

    value = word.partition("=")[2] if word.startswith("--") else word
    return bool(value) and exists(value)


def _paths_aside(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Replace paths that the parser would read as YAML by stand-ins, and return the words and stand-in → path.

    A file may be named ``[a, b]``, which YAML reads as a list, or ``#1``, which YAML reads as nothing.
    """
    paths: dict[str, str] = {}
    put: list[str] = []
    for place, word in enumerate(words):
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        config = name == "--config" or (place > 0 and words[place - 1] in ("-c", "--config"))
        yaml = set(value) & set("[]{}#&*!|>%@`'\":,-? \n\t") or value.lower() in ("null", "~", "true", "false")
        if not config and yaml and _is_path(word):
            stand_in = f"leap_pl.path.{len(paths)}"
            paths[stand_in] = value
            word = f"{name}{equals}{stand_in}"
        put.append(word)
    return put, paths


def _paths_back(value: Any, paths: dict[str, str]) -> Any:
    """Replace the stand-ins of :func:`_paths_aside` in ``value`` by their paths."""
    if isinstance(value, dict):
        return {key: _paths_back(inner, paths) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_paths_back(inner, paths) for inner in value]
    if isinstance(value, str):
        for stand_in, path in reversed(paths.items()):  # .10 before .1
            value = value.replace(stand_in, path)
    return value
