"""Tables of a report in Markdown, read back."""

import re
from itertools import pairwise


def number(cell):
    return float(re.match(r"[-+]?[\d.,]+", cell)[0].replace(",", ""))


def table_rows(page):
    """The cells of all lines of all tables, headings and rules too."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]


def section(page, heading):
    """The rows of the tables below a heading: first cell → cells, as the page shows them."""
    text = re.split(r"\n###? ", page.split(f"# {heading}\n")[1])[0]
    parts = table_rows(text)
    ends = [n for n, row in enumerate(parts) if row[0] == "---"] + [len(parts) + 1]
    return [{row[0]: row[1:] for row in parts[start + 1 : end - 1]} for start, end in pairwise(ends)]


def spread_of(cell):
    """A figure and its error."""
    return [number(part.strip()) for part in cell.split("±")]
