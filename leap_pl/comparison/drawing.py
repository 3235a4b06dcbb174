"""What the pictures of the project share: one palette, one style, SVG files that are the same for the same figures."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_pl.inputs.plain_values import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, without yellow, which is hard to see on paper; markers distinguish methods in greyscale.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
CHARACTER = 0.08  # average width of a character of a label, in inches
MOST_LETTERS = 60  # longest name in a picture; the middle of a longer one is omitted
MOST_INCHES = 100.0  # largest width and height of a picture
WIDEST = 11.5  # width of the page in inches
LONGEST_STEM = 80  # longest name in a file name, in characters
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Picture:
    """Picture on disk.

    Attributes:
        file: File name.
        caption: Description in a sentence or more.
        width: Width in inches.
    """

    file: str
    caption: str
    width: float


def figure_of(width: float, height: float) -> "tuple[Figure, Any]":
    """Return a figure of that many inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(width, MOST_INCHES), min(height, MOST_INCHES)), layout="constrained")
    return figure, figure.subplots()


def save(figure: "Figure", folder: Path, stem: str, caption: str) -> Picture:
    """Write ``figure`` into ``folder`` as ``stem``.svg."""
    file = f"{stem}.svg"
    figure.savefig(folder / file, metadata={"Date": None})  # so that the same results give the same files
    return Picture(file, caption, float(figure.get_figwidth()))


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in the project's style while the context lasts."""
    import matplotlib as mpl

    settings = {"svg.hashsalt": "leap_pl", "svg.fonttype": "none", "font.size": 10, "savefig.facecolor": "white"}
    # Names are not formulas, even if they contain $, _, ^ or \\.
    settings |= {"text.parse_math": False, "text.usetex": False}
    with mpl.rc_context(settings):
        yield


def literal(name: str, letters: int = MOST_LETTERS) -> str:
    """Return ``name`` as one line that matplotlib shows literally, the middle of a longer one left out."""
    text = shown(name, letters)
    return f" {text}" if text.startswith("_") else text  # matplotlib omits labels with a leading _ from the legend


def slug(name: str) -> str:
    """Return ``name`` as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:LONGEST_STEM] or "text"
