"""What the argument parser complains of, in one line."""

import re


def one_line(error: Exception) -> str:
    """The parser's message without its layout: which key, what was found, what would do."""
    text = " ".join(str(error).split())
    found = re.search(r'Parser key "([^"]+)":?\s*(.*)', text)
    return f"{found[1]}: {found[2]}" if found else text
