"""Describe an optimizer, schedule, gate or loss term by plain values, and find its class among those that are known.

A description is ``{class_path: NAME, init_args: {…}}``, as a config writes it. A class is only ever found by its name
in a registry of classes that are imported already: a checkpoint that names another one runs nothing.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any, Literal, get_origin, get_type_hints

from leap_pl.errors import UserError, listing
from leap_pl.inputs.plain_values import display

Spec = dict[str, Any]
Registry = Mapping[str, type]

ANY_CLASS = ""  # as a class path: the class is not known, and only its settings are compared


def described(
    made: object, registry: Registry, values: Mapping[str, Any] | None = None, *, settings_only: bool = False
) -> Spec:
    """Describe ``made`` by its class and by those arguments of its constructor that it still knows.

    Args:
        made: An optimizer, a learning-rate schedule, a gate or a term of the loss.
        registry: Classes that are described by their name alone; another is described by its whole path.
        values: Argument name → value; by default the attributes of ``made``, with or without a leading underscore.
        settings_only: All arguments of the constructor are settings; else the first is what ``made`` was made for.
    """
    kind = type(made)
    known = registry.get(kind.__name__) is kind
    held = vars(made) if values is None else values
    arguments: dict[str, Any] = {}
    for name in _arguments(kind, settings_only):
        for place in (name, f"_{name}"):
            if place in held and (plain := _plain(held[place], registry)) is not None:
                arguments[name] = plain[0]
                break
    return {"class_path": kind.__name__ if known else f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def found(spec: Any, registry: Registry, where: str, *, settings_only: bool = False) -> tuple[type, dict[str, Any]]:
    """Find the class that ``spec`` names in ``registry``, with the arguments to make one.

    Args:
        spec: A description; it may come from anywhere.
        registry: The classes that may be named.
        where: File and setting, for the message.
        settings_only: As in :func:`described`.

    Raises:
        UserError: It is no description, names a class that is not in the registry, or an argument that its
            constructor does not take or that is not a plain value.
    """
    if not (isinstance(spec, dict) and isinstance(spec.get("class_path"), str) and set(spec) <= _KEYS):
        raise UserError(
            f"{where} is {display(spec)}, and not a class with its settings. Take the checkpoint before it."
        )
    if spec["class_path"] == ANY_CLASS:
        raise UserError(f"{where}: an earlier version of leap_pl did not store its class. {_again(where)}")
    # Earlier versions wrote whole paths; the last word is looked up, and nothing is imported.
    name = spec["class_path"].rpartition(".")[2]
    kind = registry.get(name)
    if kind is None or spec["class_path"] not in (name, f"{kind.__module__}.{name}", *_FORMER.get(name, ())):
        raise UserError(
            f"{where} is {display(spec['class_path'])}, and a checkpoint may only name classes of leap_pl and torch "
            f"({listing(sorted(registry), 4)}). If this one is yours, type --{where.split()[-1]} with its settings."
        )
    arguments = spec.get("init_args") or {}
    taken = _arguments(kind, settings_only)
    strange = [word for word in arguments if word not in taken] if isinstance(arguments, dict) else [display(arguments)]
    if strange:
        raise UserError(
            f"{where}: {name} takes no {listing(sorted(map(display, strange)), 3)}. Update leap_pl or torch."
        )
    needed = [p.name for p in signature(kind).parameters.values() if p.default is Parameter.empty and p.name in taken]
    lacking = [word for word in needed if word not in arguments]
    if lacking:
        raise UserError(f"{where} is {name}, whose {listing(lacking, 3)} the checkpoint does not tell. {_again(where)}")
    for word, value in arguments.items():
        if not (_is_number_like(value) or (isinstance(value, str) and taken[word])):
            raise UserError(
                f"{where}: {word} is {display(value)}, which is not read from a checkpoint. {_again(where)}"
            )
    return kind, dict(arguments)


def _again(where: str) -> str:
    return f"Type --{where.split()[-1]} with its settings, as for the run's first start."


_STARRED = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
_KEYS = {"class_path", "init_args"}
# Where a class of this package was found in versions before.
_FORMER = {"PackedAdamW": ("leap_pl.training.optimizers.PackedAdamW",)}


def _arguments(kind: type, settings_only: bool) -> dict[str, bool]:
    """Name of each setting that a constructor takes → whether it takes a string that is just a word."""
    constructor: Callable[..., Any] = kind.__init__  # type: ignore[misc]
    try:
        hints = get_type_hints(constructor)
    except (NameError, TypeError):  # annotations that only a type checker can read
        hints = {}
    parameters = [p for p in signature(constructor).parameters.values() if p.kind not in _STARRED]
    # Before the settings come self and what it is made for; where a schedule has come to is no setting of it.
    names = [p.name for p in parameters[1 if settings_only else 2 :] if p.name not in ("state", "last_epoch")]
    return {name: hints.get(name) is str or get_origin(hints.get(name)) is Literal for name in names}


def _plain(value: Any, registry: Registry) -> tuple[Any] | None:
    """``value`` as a checkpoint can hold it, in a tuple of one; None where there is no such form."""
    if value is None or isinstance(value, bool | int | float | str):
        return (value,)
    if isinstance(value, Counter):  # how MultiStepLR keeps its milestones
        return (sorted(value.elements()),)
    if isinstance(value, list | tuple):
        items = [_plain(item, registry) for item in value]
        return None if None in items else ([item[0] for item in items if item is not None],)
    if type(value).__name__ in registry:  # a schedule of schedules
        return (described(value, registry),)
    if callable(value) and hasattr(value, "__qualname__"):  # told apart by its name, and never called by it
        return (f"{value.__module__}.{value.__qualname__}",)
    return None


def _is_number_like(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_number_like(item) for item in value)
    return value is None or isinstance(value, bool | int | float)


def same(one: Any, other: Any) -> bool:
    """Whether two plain values say the same: lists and tuples are alike, and so are 1 and 1.0.

    Of two descriptions only arguments that both tell are compared: another release of torch may know more.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        if "class_path" in one and "class_path" in other:
            paths = [side["class_path"] for side in (one, other)]
            mine, theirs = (side.get("init_args") or {} for side in (one, other))
            if not _same_class(*paths) or not (isinstance(mine, dict) and isinstance(theirs, dict)):
                return False
            return all(same(mine[key], theirs[key]) for key in mine.keys() & theirs.keys())
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, Sequence) and isinstance(other, Sequence) and not isinstance(one, str):
        return not isinstance(other, str) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)


def _same_class(one: Any, other: Any) -> bool:
    former = {path: name for name, paths in _FORMER.items() for path in paths}
    return ANY_CLASS in (one, other) or bool(former.get(one, one) == former.get(other, other))
