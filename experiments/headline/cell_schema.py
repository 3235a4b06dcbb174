"""The schema of what a finished cell says of its making, beside what ``leap_pl evaluate`` says of it."""

from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from leap_pl.inputs.plain_values import checked
from leap_pl.masks.provenance_schema import Count, Name, Share, Word

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Text(TypedDict):
    """A text that perplexity is measured on."""

    text: Name
    title: Word


class Overlap(TypedDict):
    """How far a learned mask agrees with its prior."""

    iou: Share
    chance: Share
    layers: dict[Word, Share]
    changed: Share


class Cell(TypedDict):
    """What a report shows of a cell."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    name: Name
    title: Word
    order: Count
    sparsity: Share | None
    table: Word
    text: NotRequired[Word | None]
    repeat_of: NotRequired[Name | None]
    compared_with: NotRequired[Name | None]
    baseline: bool
    reference: bool
    about: list[Name]
    texts: dict[Word, Text]
    settings: dict[Name, Any]
    prior: Name | None
    mask_of: NotRequired[Name | None]
    kept: Name | None
    tokens: Count | None
    calibration_tokens: Count | None
    seconds: Seconds | None
    peak_rss: Count | None
    digests: dict[Name, Word]
    commits: NotRequired[dict[Name, Word]]
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
