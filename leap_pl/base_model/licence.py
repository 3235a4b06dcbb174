"""Licence of a base model, as the metadata of its model card state it."""

import re

from leap_pl.errors import UserError
from leap_pl.inputs.hub import fetch_file, is_hub_id
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.reading import read_regular
from leap_pl.inputs.register import note_input

CARD = "README.md"
LONGEST_CARD = 1 << 20  # bytes

_METADATA = re.compile(r"---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
_LICENCE = re.compile(  # values that YAML reads as plain text
    r"^(license(?:_name|_link)?):[ \t]*([\"']?)((?:https?://)?\w[\w./+-]{0,200})\2[ \t]*\r?$", re.ASCII | re.MULTILINE
)


def licence_of(name: str, *, revision: str | None = None) -> dict[str, str]:
    """Return the licence that the model card of the base model ``name`` states, under the keys of the hub's metadata.

    Args:
        name: Hub id, folder or GGUF file.
        revision: Revision on the hub.

    Returns:
        ``license`` and, of one that is not in the hub's list, ``license_name`` and ``license_link``; empty if there is
        no card, if it does not say, or if it is out of reach: a licence is no reason to stop.
    """
    try:
        if is_hub_id(name):
            card = fetch_file(name, CARD, revision, what="model card")
        else:
            card = expanded(name) / CARD
            if not card.is_file():
                return {}
            note_input(card)
        text = read_regular(card, most=LONGEST_CARD).decode("utf-8", errors="replace")
    except UserError:
        return {}
    metadata = _METADATA.match(text)
    return {} if metadata is None else {key: value for key, _, value in _LICENCE.findall(metadata[1])}
