"""Text that a mask, or the weights under it, was made from, by its record: which parts of a text are held out."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from leap_pl.data.held_out import splits_in
from leap_pl.data.hub import DEFAULT_CONFIGS
from leap_pl.inputs.paths import expanded
from leap_pl.masks.mask_set import BEFORE, STAYED, TRAINED


def why_not_held_out(names: Sequence[str], config: Any) -> str | None:
    """Return why the held-out part of a local text is not what the runs recorded in a mask's ``config`` held out.

    Which documents of a file are held out depends on its number in the list of files, of a text to calibrate on as of
    one to train on. A file that no longer exists is compared by its name.

    Args:
        names: Files and patterns, in the order in which the text has them.
        config: Settings in the mask's record, or in a checkpoint; of any type.

    Returns:
        A clause on the first such file: a run was trained on all of it, or held out other documents of it, or it is not
        known which. None if there is none.
    """
    files = _all_files(names)
    for text in _texts(config):
        for number, file in enumerate(files):
            found = [place for place, one in enumerate(text.places) if one.may_be(file)]
            if found and text.whole:
                return f"the run that made this mask held out no part of {file.name}, so all of it was trained on"
            if not found or file.suffix.lower() == ".txt":  # whose last part is held out, whatever its number
                continue
            if found[0] >= text.known:
                return (
                    f"the run that made this mask read {text.places[text.known].name}, and which of its files "
                    f"{file.name} was is not known, nor which documents of it were held out"
                )
            other = [place for place in found if place < text.known and place != number]
            if other:
                return (
                    f"{file.name} was file {other[0] + 1} of {len(text.places)} of the text of the run that made this "
                    f"mask, and is file {number + 1} of {len(files)} here: other documents of it were held out"
                )
    return None


def trained_files(names: Sequence[str], config: Any) -> list[str]:
    """Return the names of the files of a local text that the runs recorded in ``config`` read at least a part of.

    A file of theirs that no longer exists is compared by its name. The arguments are those of
    :func:`why_not_held_out`.
    """
    places = [place for text in _texts(config) for place in text.places]
    return [file.name for file in _all_files(names) if any(place.may_be(file) for place in places)]


def trained_splits(dataset: str, config_name: str | None, config: Any) -> list[list[str]]:
    """Return, of each run recorded in ``config``, the splits of a hub dataset that it read at least a part of.

    Args:
        dataset: Hub id.
        config_name: Configuration of the dataset; where it is not known, here or in a record, it may be any.
        config: Settings in the mask's record, or in a checkpoint; of any type.
    """
    found = [text for text in _texts(config) if text.names == [dataset]]
    named = [(text.config_name or DEFAULT_CONFIGS.get(dataset), text) for text in found]
    return [splits_in(text.split) for name, text in named if None in (name, config_name) or name == config_name]


@dataclass(frozen=True)
class _Place:
    """A file of a run's text, or what is known of files that are not there.

    Attributes:
        file: The file, if it is there.
        name: Its name, or the pattern that it matched.
        is_pattern: Whether ``name`` is a pattern, of nobody knows how many files.
    """

    file: Path | None
    name: str
    is_pattern: bool = False

    def may_be(self, file: Path) -> bool:
        """Return whether ``file`` is this one, or has its name or pattern."""
        if self.file is not None:
            return file.samefile(self.file)
        return fnmatch(file.name, Path(self.name).name) if self.is_pattern else file.name == self.name


@dataclass(frozen=True)
class _Text:
    """Text of a run.

    Attributes:
        names: Files, patterns, or a hub id, as they were given.
        places: Its files, in order.
        whole: Whether no part of it was held out.
        config_name: Configuration of a hub dataset.
        split: Split of a hub dataset, or several joined by ``+``.
    """

    names: list[str]
    places: list[_Place]
    whole: bool
    config_name: Any
    split: str

    @property
    def known(self) -> int:
        """Return how many of the files, from the first, have a number that is known: those before a pattern."""
        return next((number for number, one in enumerate(self.places) if one.is_pattern), len(self.places))


def _texts(config: Any) -> Iterator[_Text]:
    """Yield the texts of all runs in a mask's ``config``, those that came before first."""
    if not isinstance(config, dict):
        return
    before = config.get(STAYED)
    if isinstance(before, dict):
        yield from _texts(before.get("config"))
    training = config.get(TRAINED)
    of_start = training.get(BEFORE) if isinstance(training, dict) else None
    for text in of_start if isinstance(of_start, list) else ():
        yield from _texts({"data": text})
    yield from _texts(config.get("weight_update"))  # of weights that a one-shot method updated under it
    data = config.get("data") or config  # a one-shot method records its text beside its settings
    if not isinstance(data, dict):
        return
    trained = data.get("text")
    names = [one for one in ([trained] if isinstance(trained, str) else trained or ()) if isinstance(one, str)]
    whole = bool(data.get("validation_text")) or data.get("held_out") is False
    split = data.get("split", "train")  # recorded if it is another one
    yield _Text(names, _places(names, data.get("files")), whole, data.get("config_name"), str(split))


def _places(names: Sequence[str], recorded: Any) -> list[_Place]:
    """Return the files of a run's text in its order: of ``names``, and ``recorded`` where patterns match others now."""
    places: list[_Place] = []
    for name in names:
        pattern = glob.has_magic(name)
        # Whoever made the mask wrote it: no pattern of folders, which would be looked for on all disks.
        wide = pattern and glob.has_magic(str(Path(name).parent))
        there = [] if wide else [_Place(file, file.name) for file in _files(name)]
        places += there or [_Place(None, name if pattern else Path(name).name, pattern)]
    if isinstance(recorded, list) and recorded != [place.name for place in places]:
        return [_Place(None, str(name)) for name in recorded]
    return places


def _all_files(names: Sequence[str]) -> list[Path]:
    return [file for name in names for file in _files(name)]


def _files(name: str) -> list[Path]:
    """Return the files that a file or pattern names, in the order in which a text has them."""
    if expanded(name).is_file():
        return [expanded(name)]
    return sorted(Path(found) for found in glob.glob(str(expanded(name)), recursive=True) if Path(found).is_file())  # noqa: PTH207
