"""Configs as YAML, within limits: what a few aliases stand for, written out, must fit in memory."""

from typing import Any

from leap_pl.errors import UserError

MOST_VALUES = 100_000  # with every alias written out; the longest shipped config has some hundreds
DEEPEST = 50  # mappings and lists within each other

_SURELY_SMALL = 2 * DEEPEST  # characters that hold neither too many values nor too deep ones


def check_yaml(text: str, name: str = "") -> None:
    """Make sure that ``text`` may be built: read event by event, so that nothing is built meanwhile.

    Args:
        text: YAML.
        name: What it is called in messages.

    Raises:
        UserError: It holds more than ``MOST_VALUES`` values when its aliases are written out, an alias within what
            it stands for, or values nested more than ``DEEPEST`` deep.
        yaml.YAMLError: It is no YAML.
    """
    import yaml

    if len(text) <= _SURELY_SMALL:
        return
    anchored: dict[str, int] = {}  # anchor → values that it stands for
    inside: list[tuple[str | None, int]] = []  # anchors of what is open, and the values before it
    values = 0
    called = name or "the value given"
    for event in yaml.parse(text, yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in inside):
                raise UserError(f"{called} holds an alias, *{event.anchor}, within what it stands for. Write it out.")
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
            raise UserError(f"{called} holds values nested more than {DEEPEST} deep, and settings are not. Mend it.")
        if values > MOST_VALUES:
            raise UserError(
                f"{called} holds more than {MOST_VALUES:,} values when its aliases (*name) are written out, and "
                "settings are far fewer. Write out what is meant, without aliases of aliases."
            )


def guard_parser() -> None:
    """Have the argument parser check all YAML before it builds it: configs, and files that settings name."""
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
