"""The schema of what a finished cell says of its making, beside what ``leap_pl evaluate`` says of it."""

import re
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, ConfigDict, Field
from typing_extensions import TypedDict

from leap_pl.escape import terminal
from leap_pl.inputs.plain_values import checked
from leap_pl.masks.provenance_schema import Count, Name, Share, Word

NAME = r"[a-z0-9][a-z0-9._-]*"  # of rows, texts, models and cells: their files are named after them
MARKUP = "[]<>`"  # what makes links, pictures, HTML and code in Markdown


def plain_text(text: str) -> str:
    """Return ``text``, which a page shows as it is.

    Raises:
        ValueError: It has markup or control characters; the message is the end of a sentence on it.
    """
    if set(text) & set(MARKUP) or terminal(text) != text:
        raise ValueError(f"should be plain text, without any of {' '.join(MARKUP)} and control characters")
    return text


def _cell_name(name: str) -> str:
    if not re.fullmatch(NAME, name):
        raise ValueError("should be a name of small letters, digits, dots, underscores and hyphens")
    return name


CellName = Annotated[Name, AfterValidator(_cell_name)]
Line = Annotated[Name, AfterValidator(plain_text)]
Label = Annotated[Word, AfterValidator(plain_text)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Text(TypedDict):
    """A text that perplexity is measured on."""

    text: Line
    title: Label


class Overlap(TypedDict):
    """How far a learned mask agrees with its prior."""

    iou: Share
    chance: Share
    layers: dict[Word, Share]
    changed: Share


class Cell(TypedDict):
    """What a report shows of a cell."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    name: CellName
    title: Label
    order: Count
    sparsity: Share | None
    table: Label
    text: NotRequired[Label | None]
    repeat_of: NotRequired[CellName | None]
    compared_with: NotRequired[CellName | None]
    baseline: bool
    reference: bool
    about: list[Line]
    texts: dict[Word, Text]
    settings: dict[Name, Any]
    prior: CellName | None
    mask_of: NotRequired[CellName | None]
    kept: CellName | None
    tokens: Count | None
    calibration_tokens: Count | None
    seconds: Seconds | None
    peak_rss: Count | None
    digests: dict[Name, Word]
    commits: NotRequired[dict[Name, Label]]
    commands: list[list[Name]]
    overlap: Overlap | None


def checked_cell(result: dict[str, Any], roles: tuple[str, ...], unmeasured: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the ``cell`` of ``result``, which has texts of ``roles``, and all of whose texts are measured.

    Args:
        result: What the file holds.
        roles: Texts that it has.
        unmeasured: Texts that need not be measured.

    Raises:
        ValueError: Something is missing or has another type or range; the message is one line that names it.
    """
    cell: dict[str, Any] = checked(Cell, result["cell"])
    for role in dict.fromkeys((*roles, *cell["texts"])):
        if role in unmeasured:
            continue
        if role not in cell["texts"] or cell["texts"][role]["text"] not in result["perplexity"]:
            raise ValueError(f"it lacks the perplexity on the text of '{role}'")
    return cell
