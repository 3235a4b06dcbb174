"""Errors of the argument parser in one line that says what to type instead, and checks of options and classes."""

import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from inspect import isabstract
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from leap_pl.errors import UserError, listing, one_line
from leap_pl.inputs.ranges import INSIDE, NOT_NEGATIVE, POSITIVE, refusal
from leap_pl.inputs.register import running_verb
from leap_pl.training.trainer_checks import UNSUITABLE

# Parser's complaint that an argument of a class is missing: class, arguments.
LACKING = r"class_path '(?:\w+\.)*(\w+)': the following arguments are required: ([\w, ]+?)(?: - |$)"

# The same of a class that a run calls, such as a schedule: key, arguments.
OF_CALLABLE = (
    r'Parser key "([^"]+)".*callable class: the following arguments are required: ([\w, ]+?)(?:\.? Got value| - |\.?$)'
)

# Key → Lightning's module of the classes that it takes.
LIGHTNING = {"trainer.callbacks": "lightning.pytorch.callbacks", "trainer.logger": "lightning.pytorch.loggers"}

# Base classes among them, which do nothing alone.
BASES = {"Logger", "Callback", "Checkpoint", "BaseFinetuning", "BasePredictionWriter", "ProgressBar"}

# Restriction of a type, as the parser words it → range.
RESTRICTIONS = {"v>0 and v<1": INSIDE, "v>0": POSITIVE, "v>=0": NOT_NEGATIVE}

# Options of several texts, tasks or names → how several are given.
ONCE = {
    "--perplexity": "names separated by commas",
    "--tasks": "names separated by commas",
    "--text": "a list: '[a.jsonl, b.jsonl]'",
    "--data.text": "a list: '[a.jsonl, b.jsonl]'",
    "--data.validation_text": "a list: '[a.jsonl, b.jsonl]'",
    **dict.fromkeys(("--targets", "--ignore", "--model.targets", "--model.ignore"), "a list: '[re:.*q_proj, lm_head]'"),
    "--model.weight_training.target_modules": "a list: '[q_proj, v_proj]'",
    "--baselines": "names separated by commas",
}

# Last part of a name that other tools have for a setting → end of the name of this one.
ELSEWHERE = {"learning_rate": "optimizer.lr", "text": "perplexity"}


def parser_message(error: Exception, options: Collection[str] = ()) -> str:
    """Return the message of a parser's ``error`` on one line, without Python: the key, what was found, what is valid.

    Args:
        error: Exception raised by the parser.
        options: Existing options, to suggest one for a mistyped option.
    """
    text = one_line(error)
    strange = re.match(r"[Uu]nrecognized arguments: (\S+)", text)
    if strange:
        return _unknown(strange[1], options)
    lacking = re.search(rf'key "([^"]+)": .*{LACKING}', text)
    if lacking:
        key, kind, names = lacking.groups()
        each = " ".join(f"--{key}.{name}=VALUE" for name in names.split(", "))
        return f"{key}: {kind} needs {names}. Type --{key}+={kind} {each}, or give both in a config."
    lacking = re.search(OF_CALLABLE, text)
    if lacking:
        key, names = lacking[1], lacking[2]
        kind = re.search(r"class_path='(?:\w+\.)*(\w+)'", text)
        of = kind[1] if kind else "CLASS"
        each = " ".join(f"--{key}.{name} VALUE" for name in names.split(", "))
        return f"{key}: {of} needs {names}. Type --{key} {of} {each}, or give both in a config."
    needed = re.search(r'arguments are required: (.*)|Key "([^"]+)" not found in namespace', text)
    if needed:
        names = (needed[1] or needed[2]).split(", ")
        return _missing([re.sub(r"^(--)?((fit|validate)\.)?", "", name) for name in names])
    found = re.search(r'Parser key "([^"]+)":?\s*(.*)', text)
    unknown = re.search(r"(?:does not accept option|Option) '([^']+)'", text)
    if unknown:
        return _unknown_key(f"{found[1]}." if found else "", unknown[1], options)
    if found is None:
        return text
    key, complaint = found.groups()
    outside = re.search(r"(\S+) does not conform to restriction (.*?)\.?(?: Got value|$)", complaint)
    if outside and outside[2] in RESTRICTIONS and _is_number(outside[1]):
        return refusal(key, float(outside[1]), RESTRICTIONS[outside[2]])
    # An optional key has two types, and the parser reports the failure of each.
    union = re.search(
        r"any of the Union subtypes Subtypes: .*? Errors: (.*) Given value type: .* Given value: (.*)", complaint
    )
    if union:
        reasons = [reason for reason in re.split(r"(?:^| )- ", union[1]) if reason and "NoneType" not in reason]
        complaint = f"{'; or '.join(dict.fromkeys(reasons))}. Got value: {union[2]}"
    absent = re.search(r"[Ee]xpected (?:an? )?dot import path string: (\S+?)[.;]?(?:$| )", complaint)
    if absent and ("either not accessible or invalid" in complaint or key in LIGHTNING):
        classes = _classes_for(key)
        near = get_close_matches(absent[1], classes, 1)
        there = f"There are {', '.join(classes)}." if classes else f"leap_pl {running_verb()} --help all lists them."
        remedy = f"Did you mean {near[0]}?" if near else there
        return f"{key}: there is no class {absent[1]} of this kind. {remedy}"
    group = re.search(r"Unable to load config ['\"](.*?)['\"](?: |$)", complaint)
    if group:
        if key == "model":
            return f"--model is a group of settings here. For the base model: --model.base_model {group[1]}"
        settings = [option for option in options if option.startswith(f"--{key}.")]
        each = f", or set its options one by one: {listing(settings, 5)}" if settings else ""
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
    keys = [f"--{key.replace('.init_args', '')}" for key in parser.get_defaults().keys()]  # noqa: SIM118
    return keys if table is None else [*table, *(key for key in keys if key not in table)]


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


def _unknown_key(within: str, name: str, options: Collection[str]) -> str:
    """Return the message for a key of a config, ``within`` a class or at the top, that no setting has."""
    near = _nearest(f"--{within}{name}", options)
    return f"there is no setting {within}{name}.{f' Did you mean {near[2:]}?' if near else ''} --help all lists them."


def _nearest(name: str, options: Collection[str]) -> str | None:
    """Return the option that a mistyped one may mean: one of the same last name, or else one spelled similarly."""
    last = name.rpartition(".")[2].removeprefix("--")
    for here in (last, ELSEWHERE.get(last, last)):
        within = [option for option in options if option.endswith((f".{here}", f"--{here}"))]
        near = get_close_matches(name.removesuffix(last) + here, within, 1, 0.0)
        if near:
            return near[0]
    near = get_close_matches(name, options, 1)
    return near[0] if near else None


def _classes_for(key: str) -> list[str]:
    """Return the names of Lightning's classes for a setting, without their base classes."""
    from importlib import import_module

    if key not in LIGHTNING:
        return []
    module = import_module(LIGHTNING[key])
    return sorted(name for name in module.__all__ if name not in {*BASES, *UNSUITABLE})


def _is_number(word: str) -> bool:
    try:
        return bool(word) and float(word) == float(word)
    except ValueError:
        return False


def _unknown(word: str, options: Collection[str]) -> str:
    name = word.partition("=")[0]
    if name.endswith((".yaml", ".yml")):
        return f"{name!r} does not belong to an option. To read settings from a file, type --config {name}."
    if not name.startswith("-"):
        return (
            f"{name!r} does not belong to an option. Type the option before it; an option takes one word, and a "
            "list is typed as one: a,b or '[a, b]', as its --help says."
        )
    near = _nearest(name, options)
    return f"there is no option {name}.{f' Did you mean {near}?' if near else ''} --help all lists them."


def typed_options(words: Sequence[str]) -> frozenset[str]:
    """Return the names of the options in ``words``, without dashes and the ``init_args`` of classes.

    Raises:
        UserError: A text or a task is given by an option that is typed twice, of which the parser takes the last.
    """
    names = [word.partition("=")[0] for word in words if word.startswith("--")]
    for option in ONCE:
        if names.count(option) > 1:
            raise UserError(
                f"{option} is typed {names.count(option)} times, and the last alone would be used. Type it once, with "
                f"{ONCE[option]}."
            )
    return frozenset(name.removeprefix("--").removesuffix("+").replace(".init_args", "") for name in names)


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
                "leap_pl fit --help all lists the available classes."
            )


def plain(value: Any) -> Any:
    """Return a parsed ``value`` with dictionaries instead of namespaces."""
    return value.as_dict() if isinstance(value, Namespace) else value
