"""Help of options as sentences: their texts come from docstrings, of this package and of Lightning."""

import re
from argparse import SUPPRESS, Action
from collections.abc import Mapping
from typing import ClassVar

from jsonargparse import DefaultHelpFormatter

ROLE = re.compile(r":\w+:`(?:~(?:\w+\.)*)?([^`]+)`")  # :class:`~package.Name`, of which only Name is shown, and others
DEFAULT = re.compile(r"\s+Default: (?:``[^`]*``|\w+)\.?$")  # the parser shows the default that is in effect


class SentenceFormatter(DefaultHelpFormatter):
    """Formatter of ``--help`` that shows the help of each option as sentences, without markup of docstrings.

    Attributes:
        HELP: Option → its help, in the place of that of its docstring.
    """

    HELP: ClassVar[Mapping[str, str]] = {}

    def add_argument(self, action: Action) -> None:
        """Add the help of an option."""
        if action.help and action.help != SUPPRESS:
            action.help = self.HELP.get(action.dest) or sentences(action.help)
        super().add_argument(action)


class RunFormatter(SentenceFormatter):
    """The same for the verbs of Lightning, some of whose options do more here than Lightning says."""

    HELP: ClassVar[Mapping[str, str]] = {
        "ckpt_path": "Checkpoint to resume or to validate: its path, or last for the newest in checkpoint.dirpath.",
    }


def sentences(text: str) -> str:
    """Return ``text`` from a capital letter to a period, without reStructuredText and a default at its end."""
    plain = DEFAULT.sub("", text.strip())
    plain = ROLE.sub(r"\1", plain).replace("``", "").replace(".. note::", "Note:")
    return plain[:1].upper() + plain[1:] + ("" if plain.endswith((".", ":")) else ".")
