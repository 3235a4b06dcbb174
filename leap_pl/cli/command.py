"""What every verb that is a function does before its own work: know its inputs, and spare them."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import ParamSpec, TypeVar

from leap_pl.files import check_folder, followed
from leap_pl.inputs import register as inputs

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

FOLDER, FILE = "output_dir", "output"  # what the options are called that say where to write


def command(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make ``function`` a verb: a call of it is one command, with a register of its inputs.

    Each option but ``output_dir`` and ``output`` that names something on the disk, also by a pattern or in a list, is
    an input from the start. Before ``function`` is called, the folder or file to be written is looked at: it is
    refused where it would take an input away, or, with ``force``, what leap_pl did not write.

    The function is named after its verb: ``export_command``.
    """
    parameters, verb = signature(function), function.__name__.removesuffix("_command")

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with inputs.command_inputs(verb) as register:
            bound = parameters.bind(*args, **kwargs)
            bound.apply_defaults()
            options = dict(bound.arguments)
            folder, file = options.pop(FOLDER, None), options.pop(FILE, None)
            for value in options.values():
                inputs.note_named(value)
            if folder is not None:
                check_folder(folder, force=bool(options.get("force")), verb=verb)
            if file is not None and Path(file).exists():
                register.check_file(followed(Path(file)), file)
            return function(*args, **kwargs)

    return run
