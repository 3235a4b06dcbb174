"""The state of the text in a checkpoint, compared with the text that a resumed run is given."""

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NotRequired

from torch import Tensor
from typing_extensions import TypedDict

from leap_pl.data.documents import warn
from leap_pl.data.held_out import splits_in
from leap_pl.data.hub import HubDataset
from leap_pl.distributed.strategy import check_as_rank_zero
from leap_pl.errors import UserError, listing
from leap_pl.inputs.plain_values import read
from leap_pl.masks.trained_text import trained_files, trained_splits, why_not_held_out

if TYPE_CHECKING:
    from leap_pl.data.source import TextSource
    from leap_pl.training.datamodule import TextDataModule

FORMAT = 2  # 1 had no digests of the text
HELD_OUT = "held_out (of validation_text and validation_sequences)"  # as messages name it
_COUNTS = ("line", "byte", "row", "skip")  # in the state of a reader
# Settings that choose a part of a hub dataset → their defaults.
OF_TEXT = {"config_name": None, "split": "train"}
OF_VALIDATION = {"validation_config_name": None, "validation_split": "validation"}


class StoredPosition(TypedDict):
    """Position in the text in a checkpoint; format 1 had no digests."""

    number: int
    turn: int
    state: dict[str, Any] | None
    character: int
    token: int
    shards: int
    digests: NotRequired[list[str | None]]
    document: NotRequired[str]


class Stored(TypedDict):
    """State of the text in a checkpoint."""

    format: int
    data: dict[str, Any]
    rereadable: NotRequired[bool]
    consumed: int
    micro_batch: int
    position: StoredPosition | None


def read_state(state: Any) -> Stored:
    """Return the stored ``state``, of plain values of the types that this version or an earlier one writes.

    Raises:
        UserError: It is damaged, or of a format that this version does not read.
    """
    where, damaged = "the checkpoint's position in the text", "Resume from another checkpoint of the run."
    if isinstance(state, Mapping) and "format" in state:
        check_format(state)
    stored: Stored = read(state, Stored, where, damaged)
    position = stored["position"]
    numbers: dict[str, Any] = {"": stored, "position.": position or {}}
    for within, values in numbers.items():  # pydantic's ranges would be imported with this module
        for name, number in values.items():
            if isinstance(number, int) and number < 0:
                raise UserError(
                    f"{where}.{within}{name} is {number}: input should be greater than or equal to 0. {damaged}"
                )
    if position is None:
        return stored
    reader = position["state"] or {}
    wrong = [name for name in _COUNTS if name in reader and not _is_count(reader[name])]
    wrong += ["digest"] if not isinstance(reader.get("digest"), str | None) else []
    whole = {"rereadable": stored, "digests": position, "document": position}
    lacking = [name for name, place in whole.items() if stored["format"] == FORMAT and name not in place]
    if wrong or lacking:
        raise UserError(f"{where} {'lacks' if lacking else 'has a damaged'} {[*lacking, *wrong][0]}. {damaged}")
    if len(position.get("digests", [])) not in (0, position["shards"]):
        raise UserError(f"{where} has digests of {len(position['digests'])} of {position['shards']} shards. {damaged}")
    return stored


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_format(state: Mapping[str, Any]) -> None:
    """Check that this version reads the format of a stored ``state``.

    Raises:
        UserError: It does not.
    """
    version = state.get("format")
    if version not in (1, FORMAT):
        raise UserError(
            f"The checkpoint's data position has format {version}; this version of leap_pl reads formats 1 and "
            f"{FORMAT}. Resume with the version that wrote it."
        )


def check_blocks(blocks: Tensor) -> None:
    """Check that every rank validates on the same ``blocks``; a collective that all ranks must call.

    With another number of them a rank would wait for the others for ever, in the middle of a run.

    Raises:
        UserError: They are others; every rank raises one.
    """
    check_as_rank_zero({"validation text": hashlib.sha256(blocks.contiguous().numpy().tobytes()).hexdigest()})


def warn_of_hub_part(data: "TextDataModule", source: "TextSource", *, validation: bool = False) -> None:
    """Warn of settings that choose a part of a hub dataset, where the text is local: they are not used.

    Args:
        data: Settings.
        source: Text that is learned from, or that is validated on.
        validation: Whether it is the latter.
    """
    usual = OF_VALIDATION if validation else OF_TEXT
    named = [f"data.{name}" for name, value in usual.items() if getattr(data, name) != value]
    if not named or not source.is_local:
        return
    given = "data.validation_text" if validation and data.validation_text is not None else "data.text"
    remedy = "To learn from a part of it, name the files of that part."
    if validation:
        remedy = "To validate on other text, name it: --data.validation_text FILE."
    warn(f"not used: {' and '.join(named)} choose a part of a hub dataset, and {given} is local. {remedy}")


def check_held_out(data: "TextDataModule", state: Mapping[str, Any]) -> None:
    """Check that what ``data`` holds out of its text to validate on was not trained on in the run of a checkpoint.

    Args:
        data: Settings of the validation.
        state: State of the run's data.

    Files that are not as the run has read them are warned of: other documents may be held out of them.

    Raises:
        UserError: The run held out no part of the files, or of the split of a hub dataset.
    """
    before = state.get("data", {})
    if data.validation_text is not None or not data.validation_sequences:
        return
    shards = data.open_share("held_out").shards if before.get(HELD_OUT) is not None else None
    if shards is None or shards.share != "held_out" or _without_sizes(shards.identity()) != _without_sizes(before):
        return
    if before[HELD_OUT] is False and shards.identity() == before.get("text"):
        raise UserError(
            "the run held out no part of data.text, so all of it was trained on. Name another text with "
            "--data.validation_text."
        )
    known = state.get("format") == FORMAT and state.get("rereadable") and state.get("position") is not None
    same = all(before.get(name) == getattr(data, name) for name in ("seed", "text_column"))
    if before[HELD_OUT] is False or not known or not shards.rereadable or not same:
        return
    try:
        data.stream.check_unchanged(state["position"])
    except UserError:
        warn(
            "the files of data.text are not as the run has read them: unless they have only grown, documents that are "
            "held out of them now were trained on. Restore them, or name another text with --data.validation_text."
        )


def check_not_trained(data: "TextDataModule", settings: Mapping[str, Any], *, divided: bool) -> None:
    """Check that what ``data`` validates on was not trained on in a run of other settings, by the record of its text.

    Args:
        data: Settings of the validation.
        settings: Settings of the run in its checkpoint.
        divided: Whether the run held out a part of its own text.

    Text that is named with ``validation_text``, which its user asked for, is warned of.

    Raises:
        UserError: The run was trained on what is held out of ``data.text`` now.
    """
    if not data.validation_sequences:
        return
    validated = data.open_validated()
    names = list(map(str, [text] if isinstance(text := data.validation_text or data.text, str) else text))
    shards = validated.shards
    if isinstance(shards, HubDataset):
        here = splits_in(shards.split)
        same = [here] if divided and shards.share == "held_out" else []  # what is held out of them stays so
        trained = [one for one in trained_splits(shards.dataset, shards.config_name, settings) if one not in same]
        both = sorted({split for one in trained for split in one} & {*here})
        reason = f"the run was trained on the split {listing(both, most=3)} of {shards.dataset}" if both else None
    elif data.validation_text is None:
        reason = why_not_held_out(names, settings)
    else:
        files = trained_files(names, settings)
        reason = f"the run has read {listing(files, most=3)}" if files else None
    if reason and data.validation_text is None:
        raise UserError(f"data.text: {reason}. Name another text with --data.validation_text.")
    if reason:
        warn(
            f"data.validation_text: {reason}, so that validation does not show what the mask is on other text. Name "
            "another text, or leave data.validation_text out."
        )


def _without_sizes(text: Any) -> str:
    """Return the names of files in the identity of a text, or in settings that have it."""
    named = text.get("text") if isinstance(text, Mapping) else text
    return re.sub(r" \((\d+ bytes|digest \w+)\)", "", str(named))


def check_same_data(before: Mapping[str, Any], now: Mapping[str, Any], *, text_by_name: bool) -> None:
    """Check that the settings of the text ``before`` are those ``now``.

    Args:
        before: Settings as a checkpoint stores them; earlier versions stored fewer.
        now: Settings of the run that resumes, by name.
        text_by_name: Whether the names and sizes of its files identify the text; its digests are compared otherwise.

    Raises:
        UserError: One of them is another; the message has both values of each.
    """
    # Earlier versions had no such setting, and blocks without a prefix.
    before = {"bos": "first", **before}
    known = before.get("vocabulary")
    for digest in ("vocabulary", "tokenization"):  # earlier versions had none
        before[digest] = now[digest] if before.get(digest) is None else before[digest]
    if known is not None and known == now["vocabulary"]:  # under another name, such as that of a local copy
        before["tokenizer"] = f"{now['tokenizer'].rpartition(' (')[0]} ({before['tokenizer'].rpartition(' (')[2]}"
    changed = [
        f"{name} was {before.get(name)!r} and is {now[name]!r}"
        for name in now
        if now[name] != before.get(name) and (name != "text" or text_by_name)
    ]
    if changed:
        raise UserError(
            f"The run cannot be resumed on other data: {'; '.join(changed)}. "
            "Restore these settings, or start a new run without --ckpt_path."
        )
