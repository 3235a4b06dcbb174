"""Decorator of the verbs that are functions: registers their inputs, and protects them from being overwritten."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, get_args, get_origin

from leap_pl.errors import UserError, listing
from leap_pl.inputs.paths import expanded

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

FOLDER, FILE = "output_dir", "output"  # names of the options for the output path
TEXTS = {"prompt"}  # names of the options whose value is text, whatever it looks like
# Names of the options that name no path, even where a file of that name exists.
WORDS = {*TEXTS, "method", "split", "config_name", "text_column", "revision", "pattern", "device", "targets", "ignore"}
WORDS |= {"tasks", "baselines"}
HUB = "push"  # name of the option for a repository of the hub, which no local path stands for
ADDED = "added_arguments"  # attribute of a verb's function


def command(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make ``function`` a verb: each call of it is one command with a register of its inputs.

    Every option whose value names files on the disk, also by a pattern or in a list, is registered as an input, except
    ``output_dir``, ``output``, ``push`` and those that name no path. The output folder or file is checked before
    ``function`` is called: it is refused if writing it would remove an input or, with ``force``, files that leap_pl did
    not write.

    The function is named after its verb: ``export_command``.
    """
    parameters, verb = signature(function), function.__name__.removesuffix("_command")

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        from leap_pl.files import check_folder, followed  # help does not wait for these
        from leap_pl.inputs import register as inputs
        from leap_pl.inputs.hub import check_revision
        from leap_pl.inputs.plain_values import plain_paths

        with inputs.command_inputs(verb) as register:
            bound = parameters.bind(*args, **kwargs)
            bound.apply_defaults()
            bound.arguments.update(plain_paths(bound.arguments))  # from Python, paths are taken where names are
            for name, given in bound.arguments.items():  # a shell leaves ~ in --output_dir=~/out, a config always
                if isinstance(given, str) and given.startswith("~") and name not in TEXTS:
                    bound.arguments[name] = str(expanded(given))
            options = dict(bound.arguments)
            for name, value in options.items():
                _check_choice(f"--{name}", value, parameters.parameters[name].annotation)
            folder, file, _ = (options.pop(name, None) for name in (FOLDER, FILE, HUB))
            for name, value in options.items():
                if name not in WORDS and get_origin(parameters.parameters[name].annotation) is not Literal:
                    inputs.note_named(value)
            if isinstance(options.get("model"), str):
                check_revision(options["model"], options.get("revision"), "--revision")
            if folder is not None:
                check_folder(folder, force=bool(options.get("force")), verb=verb)
            if file is not None and Path(file).exists():
                register.check_file(inputs.real_place(followed(Path(file))), file)
            return function(*bound.args, **bound.kwargs)

    return run


def _check_choice(option: str, value: Any, annotation: Any) -> None:
    """Check the value of an option that is one of some words, as the command line does before it calls a verb.

    Raises:
        UserError: It is none of them.
    """
    from leap_pl.inputs.plain_values import shown

    if get_origin(annotation) is Literal and value not in get_args(annotation):
        raise UserError(f"{option} is {shown(str(value))}. Give one of {listing(list(get_args(annotation)))}.")


def check_used(values: Mapping[str, Any], function: Callable[..., Any], overruled: bool, why: str) -> None:
    """Refuse the options among ``values`` that were given, where they would be ``overruled`` or not used.

    An option is given if it is typed, or has another value than the default of the verb's ``function``.

    Raises:
        UserError: One is.
    """
    idle = [f"--{name}" for name in given(values, function)] if overruled else []
    if idle:
        raise UserError(f"{listing(idle)} would not be used: {why}. Leave out what is not meant.")


def given(values: Mapping[str, Any], function: Callable[..., Any]) -> list[str]:
    """Return the names of those options of the verb's ``function`` that were given, in the order of ``values``."""
    from leap_pl.inputs.register import is_typed

    defaults = signature(function).parameters
    typed = [name for name, value in values.items() if value is not None and is_typed(name)]  # null takes back
    return [name for name, value in values.items() if name in typed or value != defaults[name].default]


def with_arguments(
    add: "Callable[[ArgumentParser], None]", instead_of: Sequence[str]
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Return a decorator that adds options to a verb which come from a table, not from its signature.

    Args:
        add: Function that adds the options to the verb's parser.
        instead_of: Parameters of the verb's function that are among these options.
    """

    def mark(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        vars(function)[ADDED] = (add, {*instead_of})
        return function

    return mark


def add_arguments(parser: "ArgumentParser", function: Callable[..., Any]) -> None:
    """Add the options of a verb's ``function`` to ``parser``: those of its signature and of :func:`with_arguments`."""
    add, instead_of = vars(function).get(ADDED, (None, set()))
    parser.add_function_arguments(_without_rest(function), as_group=False, skip=instead_of)
    if add is not None:
        add(parser)


def _without_rest(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a stand-in without ``**options``, for which jsonargparse would look up and parse the source."""

    @wraps(function)
    def described(**options: Any) -> Any:
        return function(**options)

    whole = signature(function)
    named = [each for each in whole.parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
    vars(described)["__signature__"] = whole.replace(parameters=named)
    return described
