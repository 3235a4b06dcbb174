"""``--ckpt_path last``: find the newest intact checkpoint of a run."""

from pathlib import Path
from typing import Any

from leap_pl.checkpoints.folder import check_folder
from leap_pl.checkpoints.layout import LAST, META, UnreadableError, load_checkpoint
from leap_pl.errors import UserError, listing


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """Return the newest intact checkpoint in ``folder``, its contents, and the errors of newer, damaged ones.

    Checkpoints are ordered by modification time, ties by name. One that is a link to elsewhere has its name in
    ``folder``.

    Returns:
        Path, contents and error messages; None if there is no checkpoint.

    Raises:
        UserError: If there are checkpoints and all are damaged, since starting a new run over them may not be intended;
            or if the system does not let the newest be read.
    """
    names = [*folder.resolve().glob("*.ckpt")] if folder.is_dir() else []
    names.sort(key=lambda file: (file.name != LAST, not file.is_symlink()))
    found = {*{file.resolve(): file for file in names}.values()}  # a link only where there is no better name
    # A sharded run's folder is dated by the file that is written last.
    marks = {place: place / META if place.is_dir() else place for place in found}
    times = {place: mark.stat().st_mtime_ns for place, mark in marks.items() if mark.is_file()}
    damaged: list[str] = []
    for file in sorted(times, key=lambda file: (times[file], len(file.name), file.name), reverse=True):
        try:
            if file.is_dir():
                check_folder(file)
            return file, load_checkpoint(file), damaged
        except UnreadableError:
            raise
        except UserError as error:
            damaged.append(str(error))
    if damaged:
        raise UserError(
            f"no checkpoint in {folder} can be read ({listing([file.name for file in times], 3)}; the newest: "
            f"{damaged[0]}) Restore one from a copy, or move them away to start a new run."
        )
    return None
