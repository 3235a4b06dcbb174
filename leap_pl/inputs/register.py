"""What a command reads, known while it runs: nothing that it replaces may hold one of its inputs.

Every command has one register of inputs. ``leap_pl`` opens it, the command's options are noted in it before anything
is done (:mod:`leap_pl.cli.command`), and whatever opens a file of the user's notes it as well (:func:`note_input`):
masks, checkpoints, results, texts, configs, model folders, and what these point at. :mod:`leap_pl.files`, through which
everything is written, asks it before anything is replaced, and an input that is found later, inside a folder that is
about to be replaced, ends the command where it is found.

Outside a command, in a program that calls the library, there is no register and nothing is refused.
"""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leap_pl.errors import UserError

MOST_LINKS = 40  # on the way to one file, as Linux has it
MOST_PIECES = 8  # of one name with commas in it, amid a list


class Inputs:
    """The register of one command.

    Attributes:
        verb: The command's name.
    """

    def __init__(self, verb: str) -> None:
        """Begin without inputs."""
        self.verb = verb
        self._read: dict[Path, str] = {}  # where an input lies, and each link to it → the name it was read by
        self._released: set[Path] = set()
        self._replacing: dict[Path, str] = {}  # folders that will be replaced → their names

    def note(self, name: str | Path) -> None:
        """Add the file or folder ``name``, with all symbolic links that lead to it.

        Raises:
            UserError: It lies in a folder that the command is about to replace.
        """
        for place in lookups(Path(name)):
            if place not in self._read:
                self._read[place] = str(name)
                for folder, called in self._replacing.items():
                    self._check(place, folder, called)

    def release(self, name: str | Path) -> None:
        """Let the command replace ``name`` although it reads it: a cache of its own."""
        self._released.update(lookups(Path(name)))

    def check_file(self, real: Path, called: str | Path) -> None:
        """Make sure that the file ``real``, which goes by the name ``called``, is no input.

        Raises:
            UserError: It is one.
        """
        name = self._read.get(real)
        if name is not None and real not in self._released:
            raise UserError(f"{called} would be replaced, and this command reads {name}. Name another file.")

    def check_folder(self, real: Path, called: str | Path) -> None:
        """Make sure that the folder ``real``, which goes by the name ``called``, is no input and holds none.

        Raises:
            UserError: It is one, or holds one.
        """
        for place in self._read:
            self._check(place, real, called)

    def _check(self, place: Path, folder: Path, called: str | Path) -> None:
        if place not in self._released and (place == folder or folder in place.parents):
            how = "is" if place == folder else "lies in"
            raise UserError(
                f"{called} would be replaced, and {self._read[place]}, which this command reads, {how} it. "
                "Name another folder."
            )

    @contextmanager
    def replacing(self, real: Path, called: str | Path) -> Iterator[None]:
        """Refuse, as long as the statement lasts, every input that is found inside the folder ``real``.

        Raises:
            UserError: One is there already.
        """
        self.check_folder(real, called)
        self._replacing[real] = str(called)
        try:
            yield
        finally:
            self._replacing.pop(real, None)


_registers: list[Inputs] = []  # of the commands that run: the last one is at work


def current() -> Inputs | None:
    """The register of the command that runs, if one does."""
    return _registers[-1] if _registers else None


@contextmanager
def command_inputs(verb: str) -> Iterator[Inputs]:
    """Open a register for the command ``verb``, or go on with the one that was opened for it.

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
    """Tell the running command's register that ``name`` is read; what is not there is passed over.

    Everything in this package that opens a file that a user may name calls this first.

    Raises:
        UserError: It lies in a folder that the command is about to replace.
    """
    register = current()
    if register is None:
        return
    for path in _spellings(name):
        if _exists(path):
            register.note(path)


def note_named(value: Any) -> None:
    """Note every file and folder that ``value``, a setting or a collection of them, names.

    Text is taken for a path where it exists as it is, then for a pattern, then for a list separated by commas.

    Raises:
        UserError: One lies in a folder that the command is about to replace.
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
    """Let the running command replace ``name`` although it reads it: a cache that it keeps."""
    register = current()
    if register is not None:
        register.release(name)


def listed(text: str) -> list[str]:
    """The entries of a list that is separated by commas; a path, or pattern, that exists as typed is one entry.

    >>> listed("wikitext2, c4")
    ['wikitext2', 'c4']

    Of several ways to take commas for a part of a name that exists, the longest name is taken. Entries may be empty.
    """
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
    """Where a look-up of ``path`` passes: every symbolic link on the way, in its real folder, and the end of it."""
    try:
        place, parts, links = Path("/"), list(path.absolute().parts[1:]), 0
    except FileNotFoundError:  # the working directory was removed, and nothing is in it
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
    """Where ``path`` leads, through all symbolic links."""
    return Path(os.path.realpath(path))


def _spellings(name: str | Path) -> set[Path]:
    """``name`` as it is, and with ``~`` for what that stands for: some readers take it so, and some so."""
    try:
        return {Path(name), Path(name).expanduser()}
    except RuntimeError:  # of somebody whom the system does not know
        return {Path(name)}


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name, or with a NUL in it
        return False


def _matches(name: str) -> list[str]:
    if not glob.has_magic(name):
        return []
    try:
        found = [path for spelled in _spellings(name) for path in glob.glob(str(spelled), recursive=True)]  # noqa: PTH207
        return [path for path in found if os.path.lexists(path)]  # of ** it names a folder that is not there
    except (OSError, ValueError):
        return []


def _found(name: str) -> bool:
    return any(map(_exists, _spellings(name))) or bool(_matches(name))
