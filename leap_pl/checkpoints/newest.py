"""``--ckpt_path last``: the newest checkpoint of a run that is whole, if there is one yet."""

from pathlib import Path
from typing import Any

from leap_pl.checkpoints.folder import check_folder
from leap_pl.checkpoints.layout import META, load_checkpoint
from leap_pl.errors import UserError, listing


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest whole checkpoint in ``folder``, what it holds, and what is wrong with newer ones.

    None where there is no checkpoint. Newest by the time it was written, and of two of one time by name.

    Raises:
        UserError: There are checkpoints, and all are damaged. To start afresh over them might not be meant.
    """
    found = {link.resolve() for link in folder.glob("*.ckpt")} if folder.is_dir() else set()
    # Of a sharded run's folder the file that is written last.
    marks = {place: place / META if place.is_dir() else place for place in found}
    times = {place: mark.stat().st_mtime_ns for place, mark in marks.items() if mark.is_file()}
    damaged: list[str] = []
    for file in sorted(times, key=lambda file: (times[file], len(file.name), file.name), reverse=True):
        try:
            if file.is_dir():
                check_folder(file)
            return file, load_checkpoint(file), damaged
        except UserError as error:
            damaged.append(str(error))
    if damaged:
        raise UserError(
            f"no checkpoint in {folder} can be read ({listing([file.name for file in times], 3)}; of the newest: "
            f"{damaged[0]}) Put one back from a copy, or move them away to start afresh."
        )
    return None
