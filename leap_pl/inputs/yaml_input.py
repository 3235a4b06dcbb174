"""Limits on YAML configs: the values that a few aliases expand to must fit in memory."""

from typing import Any

from leap_pl.errors import UserError
from leap_pl.inputs.plain_values import shown

MOST_VALUES = 100_000  # with every alias expanded; the longest shipped config has some hundreds
DEEPEST = 50  # nested mappings and lists

_SURELY_SMALL = 2 * DEEPEST  # characters, too few for too many or too deeply nested values


def safe_loader() -> Any:
    """Return the loader of plain values: the fast one of LibYAML, or where PyYAML was built without it, its own."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_yaml(text: str, name: str = "") -> None:
    """Check that ``text`` is within the limits, event by event, so that none of its values is constructed.

    Args:
        text: YAML.
        name: Name of the text in messages.

    Raises:
        UserError: It has more than ``MOST_VALUES`` values with its aliases expanded, an alias inside its own anchor,
            values nested more than ``DEEPEST`` deep, or a key twice.
        yaml.YAMLError: It is not YAML.
    """
    import yaml

    if len(text) <= _SURELY_SMALL and text.count(":") < 2:  # too short for a key that stands twice
        return
    anchored: dict[str, int] = {}  # anchor → number of its values
    inside: list[tuple[str | None, int]] = []  # anchors of the open collections, and the number of values before each
    keys: list[set[str] | None] = []  # keys of the open mappings; None: a list
    is_key: list[bool] = []  # whether the next value in each of them is a key
    values = 0
    called = name or "the value given"
    for event in yaml.parse(text, safe_loader()):
        if isinstance(event, yaml.CollectionEndEvent):
            keys.pop()
            is_key.pop()
        elif isinstance(event, yaml.NodeEvent):
            if keys and keys[-1] is not None:
                if is_key[-1] and isinstance(event, yaml.ScalarEvent) and event.value != "<<":
                    if event.value in keys[-1]:
                        raise UserError(
                            f"{called} has the key {shown(event.value)} twice, of which the last alone would be used. "
                            "Write it once."
                        )
                    keys[-1].add(event.value)
                is_key[-1] = not is_key[-1]
            if isinstance(event, yaml.CollectionStartEvent):
                keys.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
                is_key.append(True)
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in inside):
                raise UserError(f"{called} has the alias *{event.anchor} inside its own anchor. Write the value out.")
            values += anchored.get(str(event.anchor), 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            inside.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = inside.pop()
            if anchor is not None:
                anchored[anchor] = values - before
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            if event.anchor is not None:
                anchored[event.anchor] = 1
        if len(inside) > DEEPEST:
            raise UserError(f"{called} has values nested more than {DEEPEST} deep, and no setting is. Remove them.")
        if values > MOST_VALUES:
            raise UserError(
                f"{called} has more than {MOST_VALUES:,} values when its aliases (*name) are expanded, far more than "
                "settings need. Write the values out, without aliases of aliases."
            )


def guard_parser() -> None:
    """Make the argument parser check all YAML before it constructs values: configs, and files that settings name."""
    import yaml
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")
    if getattr(load, "checks", False):
        return

    def checked(stream: str) -> Any:
        check_yaml(stream)
        return load(stream)

    checked.checks = True  # type: ignore[attr-defined]
    set_loader("yaml", checked, exceptions=(yaml.YAMLError,))
