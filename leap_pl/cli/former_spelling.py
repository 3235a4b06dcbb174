"""Settings that have moved: where they used to be written is still read, and one line says what to write instead."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader

from leap_pl.errors import UserError, listing

GROUP, FORMER = "model", "annealing"  # annealing, which was a callback's group, is now model.annealing


class FormerSpellingParser(ArgumentParser):
    """A parser that takes ``annealing`` at the top of a config for ``model.annealing``.

    In each config by itself, before it is laid over what was read until then: what comes later wins, however it is
    spelled.

    Attributes:
        former: The configs that had it there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what jsonargparse's parser takes."""
        super().__init__(*args, **kwargs)
        self.former: list[str] = []

    def parse_string(self, content: str, path: Any = "", *args: Any, **kwargs: Any) -> Namespace:
        """Parse a config; jsonargparse reads a file through this too, from within its folder.

        Raises:
            UserError: It has both spellings, with different values.
        """
        settings = _mapping(content) if FORMER in content else {}
        keys = [key for key in settings if _is_of(str(key), FORMER)]
        if not keys:
            return super().parse_string(content, path, *args, **kwargs)
        # Apart from the rest, where the group may be the name of another file, and is then read from within its folder.
        alone = {f"{GROUP}.{key}": settings.pop(key) for key in keys}
        config = super().parse_string(_text(settings), path, *args, **kwargs)
        former = super().parse_string(_text(alone), path, *args, **kwargs)
        name = str(path) or "--config"
        place = f"{GROUP}.{FORMER}"
        check_agree(former.get(place), config.get(place), name)
        config.update(former)
        self.former.append(name)
        return config


def respelled(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return ``words`` with today's options in the place of former ones, and the former ones among them.

    Raises:
        UserError: Both spellings are typed, with different values.
    """
    former = [word.partition("=")[0] for word in words if _is_of(word, f"--{FORMER}")]
    if not former:
        return list(words), []
    check_agree(_typed(words, f"--{FORMER}"), _typed(words, f"--{GROUP}.{FORMER}"), "the command line")
    return [f"--{GROUP}.{word[2:]}" if _is_of(word, f"--{FORMER}") else word for word in words], former


def advice(former: Sequence[str]) -> str:
    """Return the line that says what to write instead of the ``former`` options and configs."""
    options = list(dict.fromkeys(name for name in former if name.startswith("--") and name != "--config"))
    configs = list(dict.fromkeys(name for name in former if name not in options))
    say = [f"--{GROUP}.{option[2:]} for {option}" for option in options]
    say += [f"'{FORMER}' within '{GROUP}' in {listing(configs, 4)}"] if configs else []
    return f"{FORMER} is a setting of the {GROUP} now. What was given is taken; write {', and '.join(say)}."


def check_agree(former: Any, now: Any, where: str) -> None:
    """Make sure that what is given in both spellings is the same.

    Args:
        former: The value of ``annealing``: settings, or the name of a file of them; None if it is not there.
        now: That of ``model.annealing``.
        where: What says both, for the error message.

    Raises:
        UserError: They differ.
    """
    for one, value in _leaves(former).items():
        for other, another in _leaves(now).items():
            # A name of a file stands for all that is in it.
            inside = not one or not other or f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
            if inside and (one != other or value != another):
                old, new = (".".join(filter(None, parts)) for parts in ((FORMER, one), (GROUP, FORMER, other)))
                raise UserError(
                    f"{where} says {old} {value} and {new} {another}, and both are one setting. Leave {old} out."
                )


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Return each value that is no mapping by its dotted key, ``alpha.start``; of the whole by none."""
    if value is None:
        return {}
    if isinstance(value, Namespace):
        value = value.as_dict()
    if not isinstance(value, Mapping):
        return {key: value}
    return {k: v for name, inner in value.items() for k, v in _leaves(inner, f"{key}.{name}" if key else name).items()}


def _is_of(word: str, option: str) -> bool:
    return word == option or word.startswith((f"{option}.", f"{option}="))


def _typed(words: Sequence[str], option: str) -> dict[str, Any]:
    """Return what is typed of ``option`` and of what is in it."""
    found: dict[str, Any] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if _is_of(word, option):
            name, given, value = word.partition("=")
            try:
                told = get_loader("yaml")(value if given else following)
            except yaml.YAMLError:  # which the parser tells of
                continue
            found |= _leaves(told, name.removeprefix(f"{option}.").removeprefix(option))
    return found


def _mapping(content: str) -> dict[Any, Any]:
    """Return what a config says, as jsonargparse reads it; nothing of what is no mapping, which the parser tells of."""
    try:
        told = get_loader("yaml")(content)
    except yaml.YAMLError:
        return {}
    return told if isinstance(told, dict) else {}


class _Quoting(yaml.SafeDumper):
    """Writes every string in quotes: to another reader 1e-3 without them is a number."""


_Quoting.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def _text(settings: dict[str, Any]) -> str:
    return yaml.dump(settings, Dumper=_Quoting)
