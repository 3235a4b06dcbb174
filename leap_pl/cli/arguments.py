"""Errors of the argument parser in one line that says what to type instead, and checks of configs and classes."""

import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from inspect import isabstract
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from leap_pl.errors import UserError
from leap_pl.inputs.reading import MOST_SETTINGS, check_regular, read_regular
from leap_pl.inputs.register import note_input
from leap_pl.inputs.yaml_input import check_yaml, guard_parser


def one_line(error: Exception, options: Collection[str] = ()) -> str:
    """Return the parser's message in one line, without layout and Python: the key, what was found, what is valid.

    Args:
        error: Exception raised by the parser.
        options: Existing options, to suggest one for a mistyped option.
    """
    text = " ".join(str(error).split())
    strange = re.match(r"[Uu]nrecognized arguments: (\S+)", text)
    if strange:
        return _unknown(strange[1], options)
    needed = re.search(r'arguments are required: (.*)|Key "([^"]+)" not found in namespace', text)
    if needed:
        names = (needed[1] or needed[2]).split(", ")
        return _missing([re.sub(r"^(--)?((fit|validate)\.)?", "", name) for name in names])
    found = re.search(r'Parser key "([^"]+)":?\s*(.*)', text)
    if found is None:
        return text
    key, complaint = found.groups()
    # An optional key has two types, and the parser reports the failure of each.
    union = re.search(
        r"any of the Union subtypes Subtypes: .*? Errors: (.*) Given value type: .* Given value: (.*)", complaint
    )
    if union:
        reasons = [reason for reason in re.split(r"(?:^| )- ", union[1]) if reason and "NoneType" not in reason]
        complaint = f"{'; or '.join(dict.fromkeys(reasons))}. Got value: {union[2]}"
    absent = re.search(r"[Ee]xpected (?:an? )?dot import path string: (\S+?)\.?(?:$| )", complaint)
    if absent and "either not accessible or invalid" in complaint:
        return f"{key}: there is no class {absent[1]} of this kind. leap_pl fit --help lists the available classes."
    group = re.search(r"Unable to load config ['\"](.*?)['\"](?: |$)", complaint)
    if group:
        settings = [option for option in options if option.startswith(f"--{key}.")]
        each = f", or set its options one by one: {', '.join(settings)}" if settings else ""
        return f"{key}: {group[1]} is not a file of settings. Give the path of one{each}."
    complaint = re.sub(r"\.? Got value: Namespace\(.*$", "", complaint)
    # A list may also be given as the path of a file that contains it; the parser then reports a missing file too.
    complaint = re.sub(r"^- Expected a path but .*? either not accessible or invalid - ", "", complaint)
    complaint = re.sub(r"Not of type \w+: |Type typing\..* expects a function or a callable class: ", "", complaint)
    plain = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>|typing\.(?=Literal)", r"\1", complaint)
    if re.fullmatch(r"Expected an? str\. Got value: None", plain):
        return _missing([key])
    return f"{key}: {re.sub('Expected an? ', 'expected ', plain)}"


def options_of(parser: ArgumentParser) -> list[str]:
    """Return the options of ``parser``, to suggest one for a mistyped option."""
    table = getattr(parser, "_option_string_actions", None)  # private attribute of argparse
    return [f"--{key}" for key in parser.get_defaults().keys()] if table is None else list(table)  # noqa: SIM118


def check_groups(settings: Namespace, defaults: Namespace, within: str = "") -> None:
    """Check that no group of settings is null, as a YAML key without a value is.

    Args:
        settings: Settings to check.
        defaults: Default settings of the same parser.
        within: Key of the group that both belong to, with a trailing dot.

    Raises:
        UserError: A group is null.
    """
    for key, default in vars(defaults).items():
        if not isinstance(default, Namespace) or "class_path" in default:  # null leaves out a class
            continue
        found = settings.get(key)
        if found is None:
            raise UserError(
                f"{within}{key} is null, but it is a group of settings. Leave it out, or set some of its keys: "
                f"{', '.join(vars(default))}."
            )
        if isinstance(found, Namespace):
            check_groups(found, default, f"{within}{key}.")


def _missing(keys: Sequence[str]) -> str:
    are, have = ("are", "have") if len(keys) > 1 else ("is", "has")
    add = " ".join(f"--{key} VALUE" for key in keys)
    return f"{', '.join(keys)} {are} not given, and {have} no default. Add {add}, or name a config with --config."


def _unknown(word: str, options: Collection[str]) -> str:
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return (
            f"{name!r} does not belong to an option. Type the option before it; an option takes one word, and a "
            "list is typed as one: a,b or '[a, b]', as its --help says."
        )
    near = get_close_matches(name, options, 1)
    return f"there is no option {name}.{f' Did you mean {near[0]}?' if near else ''} --help lists all options."


def check_configs(words: Sequence[str]) -> None:
    """Check that the files given with ``--config`` are valid settings, and name the first that is not.

    Afterwards the parser also checks the files that it reads by itself, those named by settings.

    Raises:
        UserError: A file is not regular, is too long, cannot be read as YAML, expands to too many values
            (:func:`leap_pl.inputs.yaml_input.check_yaml`), or is not a mapping.
    """
    import yaml

    guard_parser()
    for place, word in enumerate(words):
        option, _, name = word.partition("=") if word.startswith("--") else ("", "", word)
        is_config = option == "--config"
        if word in ("-c", "--config"):
            is_config, name = True, words[place + 1] if place + 1 < len(words) else ""
        if not name or not _exists(name):  # the parser reports missing files
            continue
        if not is_config:
            if name.endswith((".yaml", ".yml")):  # a group of settings, --model model.yaml
                note_input(name)
                check_regular(name, option)
            continue
        note_input(name)
        raw = read_regular(name, most=MOST_SETTINGS, what="--config")
        try:
            text = raw.decode("utf-8")
            check_yaml(text, f"--config {name}")
            content = yaml.load(text, yaml.CSafeLoader)
        except UserError:
            raise
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"--config {name} is not valid YAML ({reason[:200]}). Fix it, or give another file."
            ) from error
        if content is not None and not isinstance(content, dict):
            raise UserError(f'--config {name} has no settings. Write lines such as "output_dir: sparse".')


def setting_of(words: Sequence[str], name: str) -> str | None:
    """Return the last value of the setting ``name`` in ``words`` and in the configs that they name; None: not set.

    This is for settings that decide how the others are parsed. Options must be typed with their full names.
    """
    import yaml

    found: str | None = None
    for place, word in enumerate(words):
        following = words[place + 1] if place + 1 < len(words) else ""
        option, _, value = word.partition("=")
        value = value if "=" in word else following
        if option == f"--{name}":
            found = None if value in ("null", "") else value
        elif option in ("-c", "--config") and Path(value).is_file():
            content = yaml.load(Path(value).read_text(encoding="utf-8"), yaml.CSafeLoader)
            if isinstance(content, dict) and name in content:
                found = None if content[name] is None else str(content[name])
    return found


def check_classes(settings: Namespace) -> None:
    """Check that the classes named in ``settings`` are of the required kinds, before one is called.

    Raises:
        UserError: If a gate, an optimizer, a schedule or a loss term is a function, or a class that is abstract or of
            another type.
    """
    from pydoc import locate

    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from leap_pl.gates import Gate
    from leap_pl.losses.term import Term

    given: list[tuple[str, Any, type]] = [
        ("gate", settings.get("model.gate"), Gate),
        ("optimizer", settings.get("model.optimizer"), Optimizer),
        ("lr_scheduler", settings.get("model.lr_scheduler"), LRScheduler),
    ]
    given += [("objective.extra", term, Term) for term in settings.get("model.objective.extra") or ()]
    for name, one, base in given:
        if one is None:
            continue
        found = locate(one["class_path"]) if isinstance(one, Namespace) else one
        if not (isinstance(found, type) and issubclass(found, base)) or isabstract(found):
            what = getattr(found, "__qualname__", type(found).__name__)
            raise UserError(
                f"model.{name} is {getattr(found, '__module__', '')}.{what}, but must be a subclass of {base.__name__}"
                f"{' that is not abstract' if isabstract(found) else ''}. "
                "leap_pl fit --help lists the available classes."
            )


def plain(value: Any) -> Any:
    """Return a parsed ``value`` with dictionaries instead of namespaces."""
    return value.as_dict() if isinstance(value, Namespace) else value


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # the name is too long, or contains NUL
        return False
