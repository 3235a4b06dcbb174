"""What the argument parser complains of, in one line that says what to type instead."""

import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from pydoc import locate
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from leap_pl.errors import UserError
from leap_pl.inputs.reading import MOST_SETTINGS, check_regular, read_regular
from leap_pl.inputs.register import note_input
from leap_pl.inputs.yaml_input import check_yaml, guard_parser


def one_line(error: Exception, options: Collection[str] = ()) -> str:
    """The parser's message without its layout and its Python: which key, what was found, what would do.

    Args:
        error: What the parser raised.
        options: The options that there are, for what was mistyped.
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
    # A key that may also be left out is of two types, and the parser tells of the failure of each.
    union = re.search(
        r"any of the Union subtypes Subtypes: .*? Errors: (.*) Given value type: .* Given value: (.*)", complaint
    )
    if union:
        reasons = [reason for reason in re.split(r"(?:^| )- ", union[1]) if reason and "NoneType" not in reason]
        complaint = f"{'; or '.join(dict.fromkeys(reasons))}. Got value: {union[2]}"
    absent = re.search(r"[Ee]xpected (?:an? )?dot import path string: (\S+?)\.?(?:$| )", complaint)
    if absent and "either not accessible or invalid" in complaint:
        return f"{key}: there is no class {absent[1]} of this kind. leap_pl fit --help lists those that there are."
    group = re.search(r"Unable to load config ['\"](.*?)['\"](?: |$)", complaint)
    if group:
        settings = [option for option in options if option.startswith(f"--{key}.")]
        each = f", or its settings one by one: {', '.join(settings)}" if settings else ""
        return f"{key}: {group[1]} is no file of settings. Give one{each}."
    complaint = re.sub(r"\.? Got value: Namespace\(.*$", "", complaint)
    complaint = re.sub(r"Not of type \w+: |Type typing\..* expects a function or a callable class: ", "", complaint)
    plain = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>|typing\.(?=Literal)", r"\1", complaint)
    if re.fullmatch(r"Expected an? str\. Got value: None", plain):
        return _missing([key])
    return f"{key}: {re.sub('Expected an? ', 'expected ', plain)}"


def options_of(parser: ArgumentParser) -> list[str]:
    """Return the options that ``parser`` takes, for one to be suggested in the place of what was mistyped."""
    table = getattr(parser, "_option_string_actions", None)  # argparse shows it to nobody
    return [f"--{key}" for key in parser.get_defaults().keys()] if table is None else list(table)  # noqa: SIM118


def check_groups(settings: Namespace, defaults: Namespace, within: str = "") -> None:
    """Make sure that no group of settings is null, which a YAML file says of a key with nothing after it.

    Args:
        settings: What was given.
        defaults: Of the same parser.
        within: The group that both are, and a dot.

    Raises:
        UserError: One is.
    """
    for key, default in vars(defaults).items():
        if not isinstance(default, Namespace) or "class_path" in default:  # a class may be left out by null
            continue
        found = settings.get(key)
        if found is None:
            raise UserError(
                f"{within}{key} is null, and is a group of settings. Leave it out, or set what is in it: "
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
            f"{name!r} belongs to no option. Name the option before it; an option takes one word, and a list is typed "
            "as one: a,b or '[a, b]', as its --help says."
        )
    near = get_close_matches(name, options, 1)
    return f"there is no option {name}.{f' Did you mean {near[0]}?' if near else ''} --help lists all."


def check_configs(words: Sequence[str]) -> None:
    """Make sure that the files named with ``--config`` hold settings, and name the one that does not.

    From here on the parser checks what it reads by itself, too: the files that settings name.

    Raises:
        UserError: One is no regular file, is too long, cannot be read as YAML, stands for too many values
            (:func:`leap_pl.inputs.yaml_input.check_yaml`), or is no mapping.
    """
    import yaml

    guard_parser()
    for place, word in enumerate(words):
        option, _, name = word.partition("=") if word.startswith("--") else ("", "", word)
        is_config = option == "--config"
        if word in ("-c", "--config"):
            is_config, name = True, words[place + 1] if place + 1 < len(words) else ""
        if not name or not _exists(name):  # of what is not there the parser tells
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
            told = yaml.load(text, yaml.CSafeLoader)
        except UserError:
            raise
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--config {name} is no YAML ({reason[:200]}). Mend it, or give another file.") from error
        if told is not None and not isinstance(told, dict):
            raise UserError(f'--config {name} holds no settings: lines such as "output_dir: sparse" are needed.')


def setting_of(words: Sequence[str], name: str) -> str | None:
    """Return what ``words`` and the configs that they name say of ``name``, the last word of them; None: nothing.

    For a setting that decides how the rest is parsed. Options are typed by their whole names.
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
            told = yaml.load(Path(value).read_text(encoding="utf-8"), yaml.CSafeLoader)
            if isinstance(told, dict) and name in told:
                found = None if told[name] is None else str(told[name])
    return found


def check_classes(settings: Namespace) -> None:
    """Make sure that the classes which ``settings`` name are of the kind asked for, before one is called.

    Raises:
        UserError: A gate, an optimizer or a schedule is a function, or a class of another kind.
    """
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from leap_pl.gates import Gate

    for name, base in (("gate", Gate), ("optimizer", Optimizer), ("lr_scheduler", LRScheduler)):
        given = settings.get(f"model.{name}")
        if given is None:
            continue
        found = locate(given["class_path"]) if isinstance(given, Namespace) else given
        if not (isinstance(found, type) and issubclass(found, base)):
            what = getattr(found, "__qualname__", type(found).__name__)
            raise UserError(
                f"model.{name} is {getattr(found, '__module__', '')}.{what}, and has to be a class of {base.__name__}. "
                f"leap_pl fit --help lists those that there are."
            )


def plain(value: Any) -> Any:
    """Return a parsed ``value`` with dictionaries in the place of namespaces."""
    return value.as_dict() if isinstance(value, Namespace) else value


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a name, or with NUL in it
        return False
