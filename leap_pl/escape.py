"""Names and titles from outside, as text for the place where they are shown: a terminal, HTML, Markdown.

A model, a text or a task can be called anything, and whoever made the file may have meant it to be more than read:
escape sequences that act on a terminal, marks that turn text around, HTML, Markdown that fetches a picture.
"""

import html as _html
import re
import sys
import unicodedata
from typing import Any, TextIO

_JOINERS = "\u200c\u200d"  # that writing systems and emoji need
_MARKDOWN = re.compile(r"([\\`*\[\]|~$!])|(?<!\w)(_)|(_)(?!\w)|(?<=[a-zA-Z])(:)(?=//)|(?<=www)(\.)|(@)", re.IGNORECASE)


def terminal(text: Any, *, lines: bool = False) -> str:
    r"""``text`` with what a terminal would act on written out: ``\x1b``, ``\u202e``, and ``\n``.

    Args:
        text: Anything that is shown by ``str``.
        lines: Leave line ends as they are, in text of several lines that this package has laid out.
    """
    return "".join(c if lines and c == "\n" else _visible(c) for c in str(text))


def html(text: Any) -> str:
    """``text`` for an element or an attribute of a page: nothing in it is markup, or unseen."""
    return _html.escape(terminal(text))


def markdown(text: Any) -> str:
    """``text`` for one line, or a cell, of Markdown: no markup, no HTML, no address that becomes a link."""
    escaped = _MARKDOWN.sub(r"\\\g<0>", terminal(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_code(text: Any, *, cell: bool = False) -> str:
    """``text`` as code within a line of Markdown, whatever backticks it holds.

    Args:
        text: Anything that is shown by ``str``.
        cell: Of a table, in which a bar ends a cell even within code.
    """
    shown = terminal(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    edge = " " if shown.startswith("`") or shown.endswith("`") or not shown.strip() else ""
    inside = shown.replace("|", "\\|") if cell else shown
    return f"{fence}{edge}{inside}{edge}{fence}"


def say(text: Any, file: TextIO | None = None, *, lines: bool = False) -> None:
    """Print ``text`` as :func:`terminal` has it: what this package says on a terminal goes through here.

    Args:
        text: A line; with ``lines``, several of them, each of which is laid out already.
        file: Standard output by default; another one is flushed.
        lines: Leave line ends as they are.
    """
    print(terminal(text, lines=lines), file=sys.stdout if file is None else file, flush=file is not None)


def _visible(character: str) -> str:
    if character.isascii():
        return character if character.isprintable() else f"\\x{ord(character):02x}".replace("\\x0a", "\\n")
    kind = unicodedata.category(character)
    if kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and character not in _JOINERS):
        number = ord(character)
        return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
    return character
