"""Typed options that a file after them sets to another value: jsonargparse reads from left to right."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from leap_pl.cli.configs import RECIPES, options_with_values

ABSENT = object()  # of a config that has no such setting, which may also be null


def overruled(words: Sequence[str], configs: Mapping[str, Mapping[Any, Any]]) -> list[str]:
    """Return a line on each option in ``words`` that a later ``--config``, or file for a group, sets to another value.

    Args:
        words: Words of the command line.
        configs: Name of each file → its settings, as :func:`check_configs` returns them.
    """
    lines = []
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if not option.startswith("--") or option == "--config":
            continue
        value = value if equals else (words[place + 1] if place + 1 < len(words) else "")
        later = words[place + 1 :]
        if any(other.partition("=")[0] == option for other in later):
            continue
        name = option.removeprefix("--")
        # A file that is typed for a group gives each of its settings.
        given = dict(_leaves(configs[value])) if value in configs else {name: value}
        files = [(before, one) for before, one in options_with_values(later) if one in configs]
        found = (_last_other(name, value, files, configs) for name, value in given.items())
        other = next(filter(None, found), None)
        if other is not None:
            before, file, setting, then = other
            shown_file = Path(file).stem if Path(file).parent == RECIPES else file
            it = "it" if setting == name else setting
            lines.append(
                f"{before} {shown_file} comes after {option} {value}, and sets {it} to "
                f"{'null' if then is None else then}. Give {before} first, so that what is typed counts."
            )
    return lines


def _last_other(
    name: str, value: Any, files: Sequence[tuple[str, str]], configs: Mapping[str, Mapping[Any, Any]]
) -> tuple[str, str, str, Any] | None:
    """Return the last of ``files`` that sets ``name``, if to another ``value``: its option, it, ``name``, its value."""
    groups = name.split(".")
    # As typed, and as a config has the settings of a class.
    names = [".".join((*groups[:at], *inner, *groups[at:])) for at, inner in ((0, ()), (-1, ("init_args",)))]
    for option, file in reversed(files):
        values = [found for name in names if (found := _in_config(configs[file], name)) is not ABSENT]
        if values:
            same = _same_value(values[0], value) if isinstance(value, str) else values[0] == value
            return None if same else (option, file, name, values[0])
    return None


def _leaves(settings: Mapping[Any, Any], within: str = "") -> list[tuple[str, Any]]:
    """Return the settings in a config that are no groups, by their full names."""
    leaves: list[tuple[str, Any]] = []
    for key, value in settings.items():
        name = f"{within}{key}"
        leaves += _leaves(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return leaves


def _in_config(settings: Any, name: str) -> Any:
    """Return the value of the setting ``name`` in those of a config; ABSENT if it has none."""
    for part in name.split("."):
        if not isinstance(settings, dict) or part not in settings:
            return ABSENT
        settings = settings[part]
    return settings


def _same_value(of_config: Any, typed: str) -> bool:
    """Return whether a value in a config is the one that was ``typed``, or names the same class."""
    try:
        value = yaml.safe_load(typed)
    except (yaml.YAMLError, ValueError):  # the second for a date that there is not
        value = typed
    if isinstance(of_config, list) and isinstance(value, str):
        return [str(one) for one in of_config] == value.split(",")
    name = of_config.get("class_path") if isinstance(of_config, dict) else None
    if name is not None and isinstance(value, str):
        return value in (name, str(name).rpartition(".")[2])
    try:
        return bool(of_config == value or float(of_config) == float(value))  # 1e-3 is a text in YAML
    except (TypeError, ValueError):
        return False
