"""Former spellings of settings: still accepted, with one line that says what to write instead."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader

from leap_pl.errors import UserError, listing

GROUP, FORMER = "model", "annealing"  # annealing, which was a callback's group, is now model.annealing


class FormerSpellingParser(ArgumentParser):
    """Parser that reads ``annealing`` at the top level of a config as ``model.annealing``.

    Each config is converted separately, before it is merged with the earlier ones: later values override earlier ones,
    whatever the spelling.

    Attributes:
        former: Names of the configs with the former spelling.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Create a parser with the arguments of jsonargparse's parser."""
        super().__init__(*args, **kwargs)
        self.former: list[str] = []

    def parse_string(self, content: str, path: Any = "", *args: Any, **kwargs: Any) -> Namespace:
        """Parse a config; jsonargparse also uses this for files, with the file's folder as working directory.

        Raises:
            UserError: The config has both spellings, with different values.
        """
        settings = _mapping(content) if FORMER in content else {}
        keys = [key for key in settings if _is_of(str(key), FORMER)]
        if not keys:
            return super().parse_string(content, path, *args, **kwargs)
        # Separately from the rest, where the group may be the path of another file, read relative to its folder.
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
    """Return ``words`` with current options instead of former ones, and the list of former options among them.

    Raises:
        UserError: Both spellings are given, with different values.
    """
    former = [word.partition("=")[0] for word in words if _is_of(word, f"--{FORMER}")]
    if not former:
        return list(words), []
    check_agree(_typed(words, f"--{FORMER}"), _typed(words, f"--{GROUP}.{FORMER}"), "the command line")
    return [f"--{GROUP}.{word[2:]}" if _is_of(word, f"--{FORMER}") else word for word in words], former


def advice(former: Sequence[str]) -> str:
    """Return the message that says what to write instead of the ``former`` options and configs."""
    options = list(dict.fromkeys(name for name in former if name.startswith("--") and name != "--config"))
    configs = list(dict.fromkeys(name for name in former if name not in options))
    say = [f"--{GROUP}.{option[2:]} for {option}" for option in options]
    say += [f"'{FORMER}' within '{GROUP}' in {listing(configs, 4)}"] if configs else []
    return f"{FORMER} is a setting of the {GROUP} now. The former spelling is accepted; write {', and '.join(say)}."


def check_agree(former: Any, now: Any, where: str) -> None:
    """Check that the values given in both spellings are equal.

    Args:
        former: Value of ``annealing``: settings, or the path of a file with settings; None if it is not given.
        now: Value of ``model.annealing``, likewise.
        where: Source of both, for the error message.

    Raises:
        UserError: The values differ.
    """
    for one, value in _leaves(former).items():
        for other, another in _leaves(now).items():
            # The path of a file stands for all settings in it.
            inside = not one or not other or f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
            if inside and (one != other or value != another):
                old, new = (".".join(filter(None, parts)) for parts in ((FORMER, one), (GROUP, FORMER, other)))
                raise UserError(
                    f"{where} sets {old} to {value} and {new} to {another}, but they are one setting. Leave {old} out."
                )


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Return nested values by dotted keys such as ``alpha.start``; a ``value`` that is no mapping keeps ``key``."""
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
    """Return the values given for ``option`` and for the keys in it, by their dotted keys."""
    found: dict[str, Any] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if _is_of(word, option):
            name, given, value = word.partition("=")
            try:
                parsed = get_loader("yaml")(value if given else following)
            except yaml.YAMLError:  # reported by the parser
                continue
            found |= _leaves(parsed, name.removeprefix(f"{option}.").removeprefix(option))
    return found


def _mapping(content: str) -> dict[Any, Any]:
    """Return the settings of a config, as jsonargparse reads it; {} if it is no mapping: the parser reports that."""
    try:
        settings = get_loader("yaml")(content)
    except yaml.YAMLError:
        return {}
    return settings if isinstance(settings, dict) else {}


class _Quoting(yaml.SafeDumper):
    """YAML dumper that quotes every string: another reader would take an unquoted 1e-3 for a number."""


_Quoting.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def _text(settings: dict[str, Any]) -> str:
    return yaml.dump(settings, Dumper=_Quoting)
