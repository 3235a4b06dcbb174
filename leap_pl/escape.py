"""Escape names and titles from outside for the place where they are shown: a terminal, HTML, Markdown.

A model, a text or a task can have any name, and the author of the file may have chosen one that does more than
identify it: escape sequences that control a terminal, characters that reverse the direction of text, HTML, Markdown
that fetches a picture.
"""

import os
import re
import sys
import unicodedata
from contextlib import suppress
from typing import Any, TextIO

_JOINERS = "\u200c\u200d"  # needed by writing systems and emoji
_MARKDOWN = re.compile(r"([\\`*\[\]|~$!])|(?<!\w)(_)|(_)(?!\w)|(?<=[a-zA-Z])(:)(?=//)|(?<=www)(\.)|(@)", re.IGNORECASE)
_BLOCK = re.compile(r"^(\s*\d*)(?=(#{1,6}|[+.)]|-+|=+)(\s|$))")  # a heading, an item of a list, a heading's underline


def terminal(text: Any, *, lines: bool = False) -> str:
    r"""Return ``text`` with the characters that control a terminal escaped: ``\x1b``, ``\u202e``, and ``\n``.

    Args:
        text: Any object; ``str`` turns it into text.
        lines: Keep line breaks and tabs, in text of several lines.
    """
    return "".join(c if lines and c in "\n\t" else _visible(c) for c in str(text))


def html(text: Any) -> str:
    """Return ``text`` escaped for an element or attribute of an HTML page: no markup, no invisible characters."""
    from html import escape  # its table of entities would slow down every command

    return escape(terminal(text))


def markdown(text: Any) -> str:
    """Return ``text`` escaped for one line or table cell of Markdown: no markup, no HTML, no automatic link."""
    escaped = _BLOCK.sub(r"\1\\", _MARKDOWN.sub(r"\\\g<0>", terminal(text)))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_code(text: Any, *, cell: bool = False) -> str:
    """Return ``text`` as inline code of Markdown, whatever backticks it contains.

    Args:
        text: Any object; ``str`` turns it into text.
        cell: Escape bars for a table cell, which a bar ends even within code.
    """
    shown = terminal(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    edge = " " if shown.startswith("`") or shown.endswith("`") or not shown.strip() else ""
    inside = shown.replace("|", "\\|") if cell else shown
    return f"{fence}{edge}{inside}{edge}{fence}"


def say(text: Any, file: TextIO | None = None, *, lines: bool = False) -> None:
    """Print ``text`` as escaped by :func:`terminal`; all terminal output of this package goes through here.

    Args:
        text: One line; with ``lines``, several lines that are laid out already.
        file: Output stream, standard output by default.
        lines: Keep line breaks and tabs.
    """
    _print(terminal(text, lines=lines), sys.stdout if file is None else file)


def write_out(text: str) -> None:
    """Print ``text``, which is what a verb makes and no name: to a file or a pipe as it is, to a terminal escaped."""
    _print(terminal(text, lines=True) if sys.stdout.isatty() else text, sys.stdout)


def _print(shown: str, file: TextIO) -> None:
    try:
        try:
            print(shown, file=file, flush=True)  # a process that is killed takes no line away
        except UnicodeEncodeError:  # in a locale that is not UTF-8
            encoding = file.encoding
            print(shown.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)
    except OSError as error:
        give_up(file, error)


def give_up(stream: TextIO, error: OSError) -> None:
    """Write to nowhere what is written to ``stream`` from now on, which cannot be written to.

    The command goes on: it has files to write. A reader such as head, which wants no more, is no error; of any other,
    such as a full disk, one line is printed on standard error.
    """
    discard(stream)
    if stream is sys.stdout and not isinstance(error, BrokenPipeError):
        say(f"warning: standard output cannot be written ({error.strerror}); what follows is not printed.", sys.stderr)


def discard(stream: TextIO) -> None:
    """Write to nowhere what is written to ``stream`` from now on."""
    with suppress(OSError):  # a stream without a file of the system
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _visible(character: str) -> str:
    if character.isascii():
        return character if character.isprintable() else f"\\x{ord(character):02x}".replace("\\x0a", "\\n")
    kind = unicodedata.category(character)
    if kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and character not in _JOINERS):
        number = ord(character)
        return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
    return character
