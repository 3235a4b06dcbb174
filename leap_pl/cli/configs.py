"""Files of settings: ``--config``, recipes of the package, and files that stand for a group of settings."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from leap_pl.errors import UserError, one_line
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.register import exists, note_input
from leap_pl.inputs.yaml_input import check_yaml, guard_parser, safe_loader

RECIPES = Path(__file__).parents[1] / "recipes"  # files that --config also takes by their names, without suffix
SUFFIXES = (".yaml", ".yml")
GROUPS = ("model", "data", "trainer", "checkpoint")  # of a run, whose settings a file that is typed for them may have


def with_recipes(words: Sequence[str]) -> list[str]:
    """Replace names of recipes that ``--config`` gives by the paths of these files, which the package contains.

    A file in the working directory has precedence over a recipe of its name.

    Raises:
        UserError: ``--config`` names neither a file nor a recipe.
    """
    found: list[str] = []
    for place, word in enumerate(words):
        option, equals, name = word.partition("=")
        if place and words[place - 1] in ("-c", "--config"):
            option, equals, name = "", "", word
        elif option not in ("-c", "--config") or not equals:
            found.append(word)
            continue
        name = str(expanded(name)) if name.startswith("~") else name
        is_folder = name in _recipes() and Path(name).is_dir()  # which is no config, and the recipe is one
        if name and not name.startswith("-") and (is_folder or not exists(name)) and not _is_settings(name):
            name = str(_recipe(name))
        found.append(option + equals + name)
    return found


def _recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def _recipe(name: str) -> Path:
    recipes = _recipes()
    if name not in recipes:
        near = get_close_matches(name, recipes, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"--config {name}: there is no such file, and no recipe of this name.{hint} The recipes are "
            f"{', '.join(recipes)}."
        )
    return recipes[name]


def _is_settings(text: str) -> bool:
    """Return whether ``text`` is settings in place of the name of a file, which the parser also accepts."""
    return text.lstrip().startswith("{") or ": " in text or "\n" in text


def nested(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a config with its dotted keys, ``trainer.max_steps: 10``, as the groups that the parser takes them for."""
    found: dict[Any, Any] = {}
    for key, value in content.items():
        *groups, last = key.split(".") if isinstance(key, str) else [key]
        place = found
        for number, group in enumerate(groups):
            inner = place.setdefault(group, {})
            if not isinstance(inner, dict):  # a file of settings, whose content is not here
                last = ".".join([*groups[number:], last])
                break
            place = inner
        if isinstance(value, Mapping) and isinstance(place.get(last), dict):
            place[last] = place[last] | value
        else:
            place[last] = dict(value) if isinstance(value, Mapping) else value
    return found


def check_configs(words: Sequence[str]) -> dict[str, dict[Any, Any]]:
    """Check that the files given with ``--config`` are valid settings, and name the first that is not.

    Afterwards the parser also checks the files that it reads by itself, those named by settings.

    Returns:
        Name of each file → its settings, nested, with the content of files that stand for groups of settings, such as
        ``data: data.yaml``; a file that is typed for a group of a run, ``--data data.yaml``, is one of these too. They
        are in the order in which they are read.

    Raises:
        UserError: A file is not regular, is too long, cannot be read as YAML, expands to too many values
            (:func:`leap_pl.inputs.yaml_input.check_yaml`), or is not a mapping.
    """
    from leap_pl.inputs.reading import check_regular  # --help need not wait for it

    guard_parser()
    found: dict[str, dict[Any, Any]] = {}
    for place, word in enumerate(words):
        option, _, name = word.partition("=") if word.startswith(("--", "-c=")) else ("", "", word)
        is_config = option in ("-c", "--config")
        if word in ("-c", "--config"):
            is_config, name = True, words[place + 1] if place + 1 < len(words) else ""
        if not name or not exists(name):  # the parser reports missing files
            continue
        if is_config:
            content = _settings_in(name, "--config")
            found.pop(name, None)  # one that is given again is read last
            found[name] = _with_files(content, Path(name).parent, {Path(name).resolve(): None})
        elif name.endswith(SUFFIXES):  # a group of settings, --model model.yaml
            note_input(name)
            check_regular(name, option)
            option = option or (words[place - 1] if place else "")
            key = option.removeprefix("--")
            content = _with_files({key: name}, Path(), {})
            if key.partition(".")[0] in GROUPS and isinstance(content[key], dict):
                found.pop(name, None)
                found[name] = nested(content)
    return found


def _settings_in(name: str, what: str) -> dict[Any, Any]:
    """Read the settings in the file ``name``, nested; ``what`` names it in messages.

    Raises:
        UserError: As :func:`check_configs`.
    """
    import yaml

    from leap_pl.inputs.reading import MOST_SETTINGS, read_regular

    note_input(name)
    raw = read_regular(name, most=MOST_SETTINGS, what=what)
    try:
        text = raw.decode("utf-8")
        check_yaml(text, f"{what} {name}")
        content = yaml.load(text, safe_loader())
    except UserError:
        raise
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = one_line(error)
        raise UserError(f"{what} {name} is not valid YAML ({reason[:200]}). Fix it, or give another file.") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f'{what} {name} has no settings. Write lines such as "output_dir: sparse".')
    return nested(content or {})


def _with_files(settings: dict[Any, Any], folder: Path, known: dict[Path, dict[Any, Any] | None]) -> dict[Any, Any]:
    """Return ``settings`` with the content of the files in ``folder`` that stand for groups of them, at any depth.

    A file that cannot be read, or that is within itself, stays a name: the parser reads it too, and reports it.

    Args:
        settings: Settings of a file.
        folder: Folder of that file, which names of others in it are relative to.
        known: Files that were read before → their settings, each read once; None of one that is being read.
    """
    found: dict[Any, Any] = {}
    for key, value in settings.items():
        found[key] = _with_files(value, folder, known) if isinstance(value, dict) else value
        if not isinstance(value, str) or not value.endswith(SUFFIXES):
            continue
        with suppress(UserError, OSError, ValueError):
            file = (folder / expanded(value)).resolve()
            if file not in known and file.is_file():
                known[file] = None
                known[file] = _with_files(_settings_in(str(file), str(key)), file.parent, known)
            found[key] = known.get(file) or value
    return found


def check_keys(configs: Mapping[str, Mapping[Any, Any]], options: Collection[str]) -> None:
    """Check that the outermost keys of ``configs`` are settings, before the parser reports what is missing instead.

    Args:
        configs: Name of each file → its settings.
        options: Existing options.

    Raises:
        UserError: A key is none.
    """
    known = {option.removeprefix("--").partition(".")[0] for option in options}
    for name, settings in configs.items():
        strange = [str(key) for key in settings if str(key).partition(".")[0] not in known]
        if strange:
            from leap_pl.inputs.plain_values import shown

            near = get_close_matches(strange[0], known, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"--config {name}: there is no setting {shown(strange[0])}.{hint} --help all lists them.")


def setting_of(words: Sequence[str], configs: Mapping[str, Mapping[Any, Any]], name: str) -> str | None:
    """Return the last value of the setting ``name`` in ``words`` and the files that they name; None if it is not set.

    This is for settings that decide how the others are parsed. Options must be typed with their full names.

    Args:
        words: Words of the command line.
        configs: Name of each config file → its settings, as :func:`check_configs` returns them.
        name: Path of the setting.
    """
    found: str | None = None
    for place, word in enumerate(words):
        following = words[place + 1] if place + 1 < len(words) else ""
        option, _, value = word.partition("=")
        value = value if "=" in word else following
        if option == f"--{name}":
            found = None if value in ("null", "") else value
        elif option.startswith("-") and value in configs:
            content: Any = configs[value]
            *groups, last = name.split(".")
            for group in groups:
                content = content.get(group) if isinstance(content, dict) else None
            if isinstance(content, dict) and last in content:
                found = None if content[last] is None else str(content[last])
    return found


def options_with_values(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the options in ``words`` with their values."""
    pairs = []
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option.startswith("-"):
            pairs.append((option, value if equals else "".join(words[place + 1 : place + 2])))
    return pairs
