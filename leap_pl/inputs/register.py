"""Register of the inputs of a running command: no output may replace one of them.

Every command has one register. ``leap_pl`` opens it, registers the command's options before it does anything
(:mod:`leap_pl.cli.command`), and every function that opens a file of the user registers it as well
(:func:`note_input`): masks, checkpoints, results, texts, configs, model folders, and the targets of their links.
:mod:`leap_pl.files`, which writes all output, checks the register before it replaces anything. An input that is
registered later, inside a folder that is about to be replaced, ends the command at once.

Outside a command, in a program that calls the library, there is no register and nothing is refused.
"""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leap_pl.errors import UserError
from leap_pl.inputs.paths import expanded

MOST_LINKS = 40  # on the way to one file, the limit of Linux
MOST_PIECES = 8  # comma-separated pieces of one name within a list


class Inputs:
    """Register of the inputs of one command.

    Attributes:
        verb: Name of the command.
        typed: Names of the options that were typed, without dashes.
    """

    def __init__(self, verb: str) -> None:
        """Create an empty register."""
        self.verb = verb
        self.typed: frozenset[str] = frozenset()
        self._read: dict[Path, str] = {}  # real path of an input, and of each link to it → name given by the user
        self._released: set[Path] = set()
        self._replacing: dict[Path, str] = {}  # folders that will be replaced → their names

    def note(self, name: str | Path) -> None:
        """Register the file or folder ``name``, with all symbolic links on the way to it.

        Raises:
            UserError: It is inside a folder that the command is about to replace.
        """
        for place in lookups(Path(name)):
            if place not in self._read:
                self._read[place] = str(name)
                for folder, called in self._replacing.items():
                    self._check(place, folder, called)

    def release(self, name: str | Path) -> None:
        """Allow the command to replace ``name`` although it reads it, as its own cache."""
        self._released.update(lookups(Path(name)))

    def check_file(self, real: Path, called: str | Path) -> None:
        """Check that the file ``real``, which the user knows as ``called``, is not an input.

        Raises:
            UserError: It is an input.
        """
        name = self._read.get(real)
        if name is not None and real not in self._released:
            raise UserError(f"{called} would be replaced, and this command reads {name}. Name another file.")

    def check_folder(self, real: Path, called: str | Path) -> None:
        """Check that the folder ``real``, which the user knows as ``called``, neither is nor contains an input.

        Raises:
            UserError: It is or contains an input.
        """
        for place in self._read:
            self._check(place, real, called)

    def _check(self, place: Path, folder: Path, called: str | Path) -> None:
        if place not in self._released and (place == folder or folder in place.parents):
            how = "is" if place == folder else "is inside"
            raise UserError(
                f"{called} would be replaced, and {self._read[place]}, which this command reads, {how} it. "
                "Name another folder."
            )

    @contextmanager
    def replacing(self, real: Path, called: str | Path) -> Iterator[None]:
        """Refuse, within the ``with`` block, every input inside the folder ``real``.

        Raises:
            UserError: The folder contains an input already.
        """
        self.check_folder(real, called)
        self._replacing[real] = str(called)
        try:
            yield
        finally:
            self._replacing.pop(real, None)


_registers: list[Inputs] = []  # of the running commands, the innermost one last


def current() -> Inputs | None:
    """Return the register of the running command, or None outside a command."""
    return _registers[-1] if _registers else None


def is_typed(option: str) -> bool:
    """Return whether the running command was typed with ``option``, which may then have the value of its default."""
    register = current()
    return register is not None and option in register.typed


def running_verb() -> str:
    """Return the verb that is running, for messages; a run without a command line is one of ``fit``."""
    register = current()
    return "fit" if register is None else register.verb


@contextmanager
def command_inputs(verb: str) -> Iterator[Inputs]:
    """Open a register for the command ``verb``, or yield the one that is already open for it.

    Another command that it calls has its own.
    """
    running = current()
    if running is not None and running.verb == verb:
        yield running
        return
    register = Inputs(verb)
    _registers.append(register)
    try:
        yield register
    finally:
        _registers.remove(register)


def note_input(name: str | Path) -> None:
    """Register ``name`` as an input of the running command; a path that does not exist is skipped.

    Every function of this package that opens a file that a user may name calls this first.

    Raises:
        UserError: It is inside a folder that the command is about to replace.
    """
    register = current()
    if register is None:
        return
    for path in _spellings(name):
        if exists(path):
            register.note(path)


def note_named(value: Any) -> None:
    """Register every file and folder named by ``value``, a setting or a collection of settings.

    A string is read as a path if that exists, else as a pattern, else as a comma-separated list.

    Raises:
        UserError: One is inside a folder that the command is about to replace.
    """
    if isinstance(value, Path):
        note_input(value)
    elif isinstance(value, str):
        for name in listed(value):
            for path in [name, *_matches(name)]:
                note_input(path)
    elif isinstance(value, dict):
        note_named(list(value.values()))
    elif isinstance(value, list | tuple | set):
        for item in value:
            note_named(item)


def release_input(name: str | Path) -> None:
    """Allow the running command to replace ``name`` although it reads it, as its own cache."""
    register = current()
    if register is not None:
        register.release(name)


def listed(text: str) -> list[str]:
    """Return the entries of a comma-separated list; a path or pattern that exists as typed is one entry.

    >>> listed("wikitext2, c4")
    ['wikitext2', 'c4']

    A list in the brackets of YAML is one too, as ``--data.text`` takes it: ``[wikitext2, c4]``.

    Where several names with commas exist, the longest one is taken. Entries may be empty.
    """
    bracketed = text.strip()
    if bracketed[:1] + bracketed[-1:] == "[]" and not _found(text):
        return [entry.strip("'\"") for entry in listed(bracketed[1:-1])]
    pieces = text.split(",")
    entries: list[str] = []
    while pieces:
        for length in dict.fromkeys((len(pieces), *range(min(len(pieces), MOST_PIECES), 0, -1))):
            whole = ",".join(pieces[:length])
            name = next((name for name in (whole, whole.strip()) if name and _found(name)), None)
            if name is not None or length == 1:
                entries.append(whole.strip() if name is None else name)
                del pieces[:length]
                break
    return entries


def lookups(path: Path) -> Iterator[Path]:
    """Yield the paths that resolving ``path`` visits: each symbolic link, in its real folder, and the final path."""
    try:
        place, parts, links = Path("/"), list(path.absolute().parts[1:]), 0
    except FileNotFoundError:  # the working directory was removed, so it contains nothing
        return
    while parts:
        part = parts.pop(0)
        if part == "..":
            place = place.parent
            continue
        step = place / part
        if links < MOST_LINKS and step.is_symlink():
            links += 1
            yield step
            target = step.readlink()
            place = Path("/") if target.is_absolute() else place
            parts[:0] = target.parts[target.is_absolute() :]
        else:
            place = step
    yield place


def real_path(path: str | Path) -> Path:
    """Return ``path`` with all symbolic links resolved."""
    return Path(os.path.realpath(path))


def real_place(path: Path) -> Path:
    """Return ``path`` in the real path of its folder; what it is itself, such as a link that is replaced, stays."""
    return real_path(path.parent) / path.name


def _spellings(name: str | Path) -> set[Path]:
    """Return ``name`` as it is and with ``~`` expanded, since some readers expand it and others do not."""
    return {Path(name), expanded(name)}


def exists(path: str | Path) -> bool:
    """Return whether there is a file or folder ``path``; False also for text that is no valid path."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long for a name, or contains NUL
        return False


def _matches(name: str) -> list[str]:
    if not glob.has_magic(name):
        return []
    try:
        found = [path for spelled in _spellings(name) for path in glob.glob(str(spelled), recursive=True)]  # noqa: PTH207
        return [path for path in found if os.path.lexists(path)]  # for ** glob yields a folder that does not exist
    except (OSError, ValueError):
        return []


def _found(name: str) -> bool:
    return any(map(exists, _spellings(name))) or bool(_matches(name))
