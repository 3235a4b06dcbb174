"""The folder of a run: whether another run lies there, what ``--force`` replaces of it, and whether it is done.

A run writes its checkpoints into one folder, and its prior and mask there too, or into another one. It keeps a record
there of the checkpoints that it wrote (:mod:`leap_pl.inputs.records`).
"""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leap_pl.checkpoints.identity import KEY, Identity, read_identity
from leap_pl.checkpoints.layout import META, is_checkpoint
from leap_pl.checkpoints.settings import RULES, differences
from leap_pl.errors import UserError, listing
from leap_pl.files import atomic_file, atomic_link, remove_abandoned
from leap_pl.inputs import records
from leap_pl.inputs import register as inputs
from leap_pl.inputs.records import MASK, is_mask_file
from leap_pl.masks.mask_set import MaskSet

_GROUPS = ("model", "data", "trainer")
LAST = "last.ckpt"


class Finished(Exception):  # noqa: N818  (no error: the run is done)
    """A run that was to be resumed is done; says where its mask is."""


@dataclass(frozen=True)
class Leftover:
    """A file or folder of an earlier run, as it was when it was looked at."""

    path: Path
    inode: int
    written: int

    @classmethod
    def of(cls, path: Path) -> "Leftover":
        """What ``path`` is now."""
        status = path.lstat()
        return cls(path, status.st_ino, status.st_mtime_ns)

    def remove(self) -> None:
        """Remove it, unless another file has taken its name meanwhile."""
        if not os.path.lexists(self.path) or Leftover.of(self.path) != self:
            return
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink()


def earlier_run(
    folder: Path, masks: Path, *, ckpt_path: str | Path | None, force: bool, last: bool = False
) -> list[Leftover]:
    """Make sure that a run may begin in ``folder``.

    Args:
        folder: Of its checkpoints.
        masks: Where its prior and its mask go.
        ckpt_path: The checkpoint that it resumes from; one in ``folder`` makes it the run that is there.
        force: Replace an earlier run.
        last: It is told to resume from the last checkpoint. Where there is none, a mask that is there all the same is
            its own: it was killed behind that.

    Returns:
        What is to be removed of an earlier run, once the new one begins.

    Raises:
        UserError: There is an earlier run, and it is not to be replaced; or files that leap_pl did not write have the
            names that the run gives to its own, or, with ``force``, lie among the checkpoints; or the run reads what
            it would replace.
    """
    for place in {folder, masks}:
        wrote = records.verb_of(place)
        if (place / records.RECORD).exists() and wrote != "fit":
            raise UserError(
                f"{place} is a folder that leap_pl {wrote or 'export'} wrote, or has another {records.RECORD}. Name "
                "another folder with --checkpoint.dirpath."
            )
    resumes = ckpt_path is not None and inputs.real_path(ckpt_path).parent == inputs.real_path(folder)
    if resumes and force:
        raise UserError(
            f"--force replaces the run in {folder}, and --ckpt_path resumes it. Choose one: leave out --force, or "
            "--ckpt_path."
        )
    checkpoints = [] if resumes else sorted(folder.glob("*.ckpt"))
    # A resumed run reads the priors that it started from, and writes none over them.
    priors = [] if resumes else [masks / "prior.safetensors", masks / "prior-inner.safetensors"]
    mask = masks / MASK
    _check_not_read([mask, *priors, *checkpoints])
    ours = [path for path in (mask, *priors) if os.path.lexists(path)]
    strange = [path for path in ours if not is_mask_file(path)]
    if strange:
        raise UserError(
            f"{listing([str(path) for path in strange])} would be replaced, and is no mask of leap_pl. Name another "
            "folder with --checkpoint.dirpath or --mask_export.folder."
        )
    if resumes or not (checkpoints or mask in ours) or (last and not checkpoints):
        return []
    if not force:
        found = listing([path.name for path in (*checkpoints, *([mask] if mask in ours else []))], 4)
        raise UserError(
            f"{folder if checkpoints else masks} holds another run ({found}). Add --ckpt_path last to resume it, or "
            "--force to replace it, or name another folder with --checkpoint.dirpath."
        )
    recorded = records.recorded(folder)
    strange = [path for path in checkpoints if path.name not in recorded and not _is_ours(path, folder)]
    if strange:
        raise UserError(
            f"{folder} holds checkpoints that leap_pl did not write, or not as they are: "
            f"{listing([path.name for path in strange], 4)}. --force removes only what an earlier run wrote; move them "
            "away, or name another folder with --checkpoint.dirpath."
        )
    record = [folder / records.RECORD] if (folder / records.RECORD).exists() else []
    return [Leftover.of(path) for path in (*checkpoints, *ours, *record)]


def _check_not_read(files: list[Path]) -> None:
    register = inputs.current()
    for file in files if register is not None else ():
        assert register is not None
        register.check_file(inputs.real_path(file.parent) / file.name, file)


def _is_ours(path: Path, folder: Path) -> bool:
    """Whether a checkpoint is one of leap_pl: a file, the folder of a sharded run, or a link to one beside it."""
    if path.is_symlink():
        return inputs.real_path(path).parent == inputs.real_path(folder)
    return is_checkpoint(path / META if path.is_dir() else path)


def record_checkpoint(folder: Path, name: str) -> None:
    """Add the checkpoint ``name``, which is about to be written, to the record of its run in ``folder``.

    A record that cannot be written is done without: a whole checkpoint can be told without it.
    """
    text = records.extended(folder, "fit", [name, LAST], job=os.environ.get("SLURM_JOB_ID"))
    with suppress(UserError), atomic_file(folder / records.RECORD, own=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def begun_by_this_job(folder: Path) -> bool:
    """Whether the run in ``folder`` was begun by this SLURM job, which was requeued since."""
    return records.job_of(folder) == os.environ.get("SLURM_JOB_ID")


def link_last(folder: Path, file: Path) -> None:
    """Let ``last.ckpt`` in ``folder`` lead to ``file`` there: a run may have been killed before it linked it."""
    file, link = inputs.real_path(file), folder / LAST
    if (
        file.parent == inputs.real_path(folder)
        and (link.is_symlink() or not link.exists())
        and inputs.real_path(link) != file
    ):
        atomic_link(link, file)


def finished_mask(checkpoint: dict[str, Any], masks: Path, settings: Mapping[str, Any]) -> tuple[Path, Identity] | None:
    """The mask of a finished run, and whose it is; None where the run is not finished, or is not the one asked for.

    Args:
        checkpoint: The newest of the run.
        masks: Where its mask is.
        settings: As the run is asked for now: plain values by their names in :mod:`leap_pl.checkpoints.settings`.
    """
    max_steps = settings.get("trainer.max_steps")
    if KEY not in checkpoint or int(checkpoint.get("global_step", -1)) < int(max_steps or 0):
        return None
    identity, path = read_identity(checkpoint), masks / MASK
    stored = identity.learned_with
    if identity.max_steps != max_steps or not all(_as_asked(name, stored[name], settings) for name in stored):
        return None
    try:
        with inputs.command_inputs("is it finished"):  # the run may write this mask: it is no input of it
            told = MaskSet.load(path).provenance
    except UserError:
        return None
    same = (told.fingerprint, told.sparsity, told.config.get("max_steps"))
    return (path, identity) if same == (identity.fingerprint, identity.sparsity, max_steps) else None


def _as_asked(name: str, stored: Any, settings: Mapping[str, Any]) -> bool:
    """Whether a setting that is part of what is learned is asked for as it was; if unsure, no."""
    if RULES.get(name) != "fixed" or settings.get(name) == "auto":
        return True
    return not differences(name, _by_name(stored), _by_name(settings.get(name)))


def _by_name(value: Any) -> Any:
    """A class described by its name alone, without the path to it."""
    if isinstance(value, dict) and isinstance(value.get("class_path"), str):
        return {**value, "class_path": value["class_path"].rpartition(".")[2]}
    return value


def tidy(folder: Path, newest: Path) -> None:
    """Leave a finished run's ``folder`` as its end would have: no half-written files, ``last.ckpt`` the newest."""
    with suppress(OSError):  # it can only be read
        remove_abandoned(folder)
        link_last(folder, newest)


def replaces(settings: Any, *, requeued: bool) -> bool:
    """Whether a run replaces what is in its folder: ``--force``, unless a requeued job has done so already.

    Args:
        settings: Of fit, with ``force``, ``ckpt_path`` and ``checkpoint.dirpath``.
        requeued: Whether this is a job that SLURM has started again.

    Raises:
        UserError: It is told to resume as well.
    """
    folder = settings.checkpoint.dirpath
    if settings.force and settings.ckpt_path == "last":
        raise UserError(
            f"--force replaces the run in {folder}, and --ckpt_path last resumes it. Choose one: leave out --force, or "
            "--ckpt_path."
        )
    return bool(settings.force) and not (requeued and folder and begun_by_this_job(Path(folder).expanduser()))


def check_settings(settings: Any, *, force: bool, last: bool) -> None:
    """Look at the folder of a run before anything is loaded: :func:`earlier_run`, as far as the settings name it.

    Raises:
        UserError: As :func:`earlier_run` does.
    """
    options = {key: value for key, value in settings.as_dict().items() if key not in ("ckpt_path", "checkpoint")}
    inputs.note_named(options)
    if settings.checkpoint.dirpath is None or "://" in settings.checkpoint.dirpath:
        return
    folder = Path(settings.checkpoint.dirpath).expanduser()
    earlier_run(folder, masks_of(settings), ckpt_path=settings.ckpt_path, force=force, last=last)


def check_finished(settings: Any, newest: Path, checkpoint: dict[str, Any]) -> None:
    """Stop here if the run that is to be resumed is done, and asked for as it was.

    Raises:
        Finished: It is; says where its mask is.
    """
    masks, folder = masks_of(settings), Path(settings.checkpoint.dirpath).expanduser()
    asked = {f"{group}.{name}": value for group in _GROUPS for name, value in settings[group].as_dict().items()}
    found = finished_mask(checkpoint, masks, asked)
    if found is not None:
        tidy(folder, newest)
        mask, identity = found
        step = checkpoint["global_step"]
        raise Finished(
            f"the run in {folder} is finished: {newest.name} (step {step}) is its last checkpoint, and its mask, of "
            f"sparsity {identity.sparsity:g}, is {mask}."
        )


def masks_of(settings: Any) -> Path:
    """Where the settings of a run with a ``checkpoint.dirpath`` put its prior and its mask."""
    return Path(settings.mask_export.folder or Path(settings.checkpoint.dirpath).expanduser())
