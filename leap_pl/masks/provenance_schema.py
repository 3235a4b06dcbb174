"""Schema of the provenance in a mask file, and in a model folder made from a mask: plain values with known names.

Unknown keys are dropped: a newer leap_pl may write more.
"""

import re
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, ConfigDict, Field
from typing_extensions import TypedDict

from leap_pl.base_model.prefix import Bos
from leap_pl.inputs.plain_values import LONGEST_NAME, checked, parse_json, plain
from leap_pl.masks.patterns import read_form

MOST_DIMENSIONS = 8
MOST_ELEMENTS = 1 << 48  # of one weight

Name = Annotated[str, Field(max_length=LONGEST_NAME)]
Word = Annotated[str, Field(max_length=256)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


def _form(text: str) -> str:
    if re.search(r"\d{7}", text):
        raise ValueError("should name a form of masks, such as 2:4")
    read_form(text)  # refuses 0:4
    return text


def _names(value: Any) -> Any:
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and len(name) <= LONGEST_NAME for name in names):
        raise ValueError("should be a name or a list of names")
    return value


Form = Annotated[str, Field(max_length=64), AfterValidator(_form)]
Names = Annotated[Any, AfterValidator(_names)]


class Data(TypedDict, total=False):
    """Data that a mask was learned from."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    text: Names | None
    seq_length: Count | None
    bos: Bos


class Config(TypedDict, total=False):
    """Settings of a method: those that leap_pl reads back are typed, others may be any plain values."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    pattern: Form
    data: Data
    dtype: Word | None
    perplexity: float | None
    dense_perplexity: float | None


class ProvenanceFields(TypedDict):
    """Fields of :class:`leap_pl.masks.Provenance`."""

    base_model: Name
    fingerprint: Word
    method: Word
    sparsity: NotRequired[Share | None]
    revision: NotRequired[Name | None]
    config: NotRequired[Config]
    versions: NotRequired[dict[Word, Word]]


Size = Annotated[int, Field(ge=1, le=MOST_ELEMENTS)]
Shape = Annotated[list[Size], Field(min_length=1, max_length=MOST_DIMENSIONS)]


def provenance_fields(values: Any) -> dict[str, Any]:
    """Return the fields of a :class:`leap_pl.masks.Provenance` in the plain ``values``.

    Raises:
        ValueError: A field is missing, or of a wrong type or range; the message is one line that names it.
    """
    fields: dict[str, Any] = checked(ProvenanceFields, values)
    if "config" in fields:
        # Earlier versions wrote the perplexity of a broken model as NaN.
        fields["config"] = plain(fields["config"])
    return fields


def parse_provenance(text: str) -> dict[str, Any]:
    """Parse the fields from JSON; raise as :func:`provenance_fields` does."""
    return provenance_fields(parse_json(text, finite=False))


def parse_shapes(text: str) -> dict[str, list[int]]:
    """Parse weight name → shape from JSON; raise as :func:`provenance_fields` does."""
    shapes: dict[str, list[int]] = checked(dict[Name, Shape], parse_json(text))
    return shapes
