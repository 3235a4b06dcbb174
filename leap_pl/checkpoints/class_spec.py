"""Describe optimizers, schedules, gates and loss terms as plain values, and look their classes up in a registry.

A description is ``{class_path: NAME, init_args: {…}}``, as in a config. Classes are only looked up by name, in a
registry of classes that are already imported, so a checkpoint that names any other class cannot run code.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any, Literal, get_origin, get_type_hints

from leap_pl.errors import UserError, listing
from leap_pl.inputs.plain_values import display

Spec = dict[str, Any]
Registry = Mapping[str, type]

ANY_CLASS = ""  # class path of an unknown class, of which only the settings are compared


def describe(
    made: object, registry: Registry, values: Mapping[str, Any] | None = None, *, settings_only: bool = False
) -> Spec:
    """Return the class of ``made`` and those arguments of its constructor that it stores, as plain values.

    Args:
        made: An optimizer, a learning-rate schedule, a gate or a loss term.
        registry: Classes that are described by their name alone; any other class is described by its full path.
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


def resolve_class(
    spec: Any, registry: Registry, where: str, *, settings_only: bool = False
) -> tuple[type, dict[str, Any]]:
    """Return the class that ``spec`` names in ``registry``, and the arguments of its constructor.

    Args:
        spec: A description from an untrusted source.
        registry: The classes that may be named.
        where: File and setting, for error messages.
        settings_only: As in :func:`describe`.

    Raises:
        UserError: If ``spec`` is not a description, or names a class that is not in the registry, an argument that its
            constructor does not accept, or a value that is not plain.
    """
    if not (isinstance(spec, dict) and isinstance(spec.get("class_path"), str) and set(spec) <= _KEYS):
        raise UserError(f"{where} is {display(spec)}, not a class with its settings. Take the checkpoint before it.")
    if spec["class_path"] == ANY_CLASS:
        raise UserError(f"{where}: an earlier version of leap_pl did not store its class. {_again(where)}")
    # Earlier versions wrote full paths: only the last word is looked up, and nothing is imported.
    name = spec["class_path"].rpartition(".")[2]
    kind = registry.get(name)
    if kind is None or spec["class_path"] not in (name, f"{kind.__module__}.{name}", *_FORMER.get(name, ())):
        raise UserError(
            f"{where} is {display(spec['class_path'])}, and a checkpoint may only name classes of leap_pl and torch "
            f"({listing(sorted(registry), 4)}). If this one is yours, type --{where.split()[-1]} with its settings."
        )
    arguments = spec.get("init_args") or {}
    accepted = _arguments(kind, settings_only)
    extra = (
        [word for word in arguments if word not in accepted] if isinstance(arguments, dict) else [display(arguments)]
    )
    if extra:
        raise UserError(
            f"{where}: {name} has no argument {listing(sorted(map(display, extra)), 3)}. Update leap_pl or torch."
        )
    required = [
        p.name for p in signature(kind).parameters.values() if p.default is Parameter.empty and p.name in accepted
    ]
    missing = [word for word in required if word not in arguments]
    if missing:
        raise UserError(f"{where} is {name}, and the checkpoint lacks its {listing(missing, 3)}. {_again(where)}")
    for word, value in arguments.items():
        if not (_is_number_like(value) or (isinstance(value, str) and accepted[word])):
            raise UserError(
                f"{where}: {word} is {display(value)}, which is not read from a checkpoint. {_again(where)}"
            )
    return kind, dict(arguments)


def _again(where: str) -> str:
    return f"Type --{where.split()[-1]} with its settings, as for the run's first start."


_STARRED = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
_KEYS = {"class_path", "init_args"}
# Class name → full paths of the class in earlier versions.
_FORMER = {"PackedAdamW": ("leap_pl.training.optimizers.PackedAdamW",)}


def _arguments(kind: type, settings_only: bool) -> dict[str, bool]:
    """Map the name of each setting of a constructor to whether it may be a string."""
    found: dict[str, bool] = {}
    for constructor in constructors(kind):
        try:
            hints = get_type_hints(constructor)
        except (NameError, TypeError):  # annotations that only a type checker can read
            hints = {}
        parameters = [p for p in signature(constructor).parameters.values() if p.kind not in _STARRED]
        positional = sum(p.kind is not Parameter.KEYWORD_ONLY for p in parameters)
        # The first is self, the second what it is built on (parameters, an optimizer); progress is not a setting.
        names = [p.name for p in parameters[min(positional, 1 if settings_only else 2) :]]
        for name in (name for name in names if name not in ("state", "last_epoch")):
            found.setdefault(name, hints.get(name) is str or get_origin(hints.get(name)) is Literal)
    return found


def constructors(kind: type) -> Iterator[Callable[..., Any]]:
    """Yield the constructor of a class and, as long as one passes on keywords that it does not name, the next ones."""
    for owner in kind.__mro__:
        constructor = vars(owner).get("__init__")
        if constructor is not None:
            yield constructor
            if all(p.kind is not Parameter.VAR_KEYWORD for p in signature(constructor).parameters.values()):
                return


def _plain(value: Any, registry: Registry) -> tuple[Any] | None:
    """Return ``value`` as plain values in a tuple of one, or None if it has no such form."""
    if value is None or isinstance(value, bool | int | float | str):
        return (value,)
    if isinstance(value, Counter):  # how MultiStepLR keeps its milestones
        return (sorted(value.elements()),)
    if isinstance(value, list | tuple):
        items = [_plain(item, registry) for item in value]
        return None if None in items else ([item[0] for item in items if item is not None],)
    if type(value).__name__ in registry:  # a schedule of schedules
        return (describe(value, registry),)
    if callable(value) and hasattr(value, "__qualname__"):  # its name is only compared, never looked up
        return (f"{value.__module__}.{value.__qualname__}",)
    return None


def _is_number_like(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_number_like(item) for item in value)
    return value is None or isinstance(value, bool | int | float)


def same(one: Any, other: Any) -> bool:
    """Return whether two plain values are equal, treating lists and tuples alike, and 1 and 1.0 alike.

    Two descriptions are compared by the arguments that both contain, because another release of torch may have more.
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
