"""Typed options that a config after them sets to another value: jsonargparse reads from left to right."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from leap_pl.cli.arguments import RECIPES

ABSENT = object()  # of a config that has no such setting, which may also be null


def overruled(words: Sequence[str], configs: Mapping[str, Mapping[Any, Any]]) -> list[str]:
    """Return a line on each option in ``words`` that a later ``--config`` sets to another value.

    Args:
        words: Words of the command line.
        configs: Name of each config file → its settings, as :func:`check_configs` returns them.
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
        groups = option.removeprefix("--").split(".")
        # As typed, and as a config has the settings of a class.
        names = [".".join((*groups[:at], *inner, *groups[at:])) for at, inner in ((0, ()), (-1, ("init_args",)))]
        given = [one.partition("=")[2] if "=" in one else one for one in later]
        for config in [one for one in reversed(given) if one in configs]:
            values = [found for name in names if (found := _in_config(configs[config], name)) is not ABSENT]
            if values:
                if not _same_value(values[0], value):
                    shown_config = Path(config).stem if Path(config).parent == RECIPES else config
                    then = "null" if values[0] is None else values[0]
                    lines.append(
                        f"--config {shown_config} comes after {option} {value}, and sets it to {then}. Give --config "
                        "first, so that what is typed counts."
                    )
                break
    return lines


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
