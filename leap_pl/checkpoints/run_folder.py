"""Run folders: detect an earlier run, decide what ``--force`` replaces, and recognise a finished run.

A run writes its checkpoints into one folder, and its prior and mask into the same or another one. It keeps a record of
the checkpoints that it wrote (:mod:`leap_pl.inputs.records`).
"""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leap_pl.checkpoints.identity import KEY, Identity, read_identity
from leap_pl.checkpoints.layout import LAST, META, is_checkpoint
from leap_pl.checkpoints.settings import RULES, differences
from leap_pl.errors import UserError, listing
from leap_pl.files import atomic_file, atomic_link, remove_abandoned
from leap_pl.gates import gate_kinds
from leap_pl.inputs import records
from leap_pl.inputs import register as inputs
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.records import MASK, WEIGHTS, is_mask_file, is_weights_file
from leap_pl.masks.mask_set import TRAINED, MaskSet
from leap_pl.prior.started_prior import DIGESTS, prior_file

_GROUPS = ("model", "data", "trainer")


class Finished(Exception):  # noqa: N818  (no error: the run is done)
    """Raised if the run to resume is already finished; the message says where its mask is."""


@dataclass(frozen=True)
class Leftover:
    """File or folder of an earlier run, with the state it was found in."""

    path: Path
    inode: int
    written: int

    @classmethod
    def of(cls, path: Path) -> "Leftover":
        """Return ``path`` with its current state."""
        status = path.lstat()
        return cls(path, status.st_ino, status.st_mtime_ns)

    def remove(self) -> None:
        """Remove the file or folder, unless another one has taken its name since."""
        if not os.path.lexists(self.path) or Leftover.of(self.path) != self:
            return
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink()


def lies_in(checkpoint: str | Path, folder: Path) -> bool:
    """Return whether ``checkpoint`` is in ``folder``, be it a link there to a file on another disk."""
    place = inputs.real_path(folder)
    return place in (inputs.real_path(checkpoint).parent, inputs.real_path(Path(checkpoint).parent))


def earlier_run(
    folder: Path, masks: Path, *, ckpt_path: str | Path | None, force: bool, last: bool = False
) -> list[Leftover]:
    """Check that a run may start in ``folder``, and list the files of an earlier run to remove.

    Args:
        folder: Folder of the run's checkpoints.
        masks: Folder of the run's prior and mask.
        ckpt_path: Checkpoint that the run resumes from; if it is in ``folder``, the run there is this one.
        force: Replace an earlier run.
        last: Resume from the last checkpoint. If there is none, a mask in ``masks`` is this run's own, which was killed
            before it wrote a checkpoint.

    Returns:
        Files and folders of an earlier run, to be removed once the new one starts.

    Raises:
        UserError: If there is an earlier run and ``force`` is false; if files that leap_pl did not write have names
            that the run writes to or, with ``force``, are among the checkpoints; or if the run reads a file that it
            would replace.
    """
    for place in {folder, masks}:
        wrote = records.verb_of(place)
        if (place / records.RECORD).exists() and wrote != "fit":
            raise UserError(
                f"{place} was written by leap_pl {wrote or 'export'}, or has another {records.RECORD}. Name another "
                "folder with --checkpoint.dirpath."
            )
    resumes = ckpt_path is not None and lies_in(ckpt_path, folder)
    if resumes and force:
        raise UserError(
            f"--force replaces the run in {folder}, and --ckpt_path resumes it. Choose one: leave out --force, or "
            "--ckpt_path."
        )
    checkpoints = [] if resumes else sorted(folder.glob("*.ckpt"))
    # A resumed run reads the priors that it started from, and does not overwrite them.
    forms = dict.fromkeys(form for kind in gate_kinds().values() for form in kind.starts_from())
    priors = [] if resumes else [masks / prior_file(form) for form in forms]
    mask, weights = masks / MASK, masks / WEIGHTS
    if (register := inputs.current()) is not None:
        for file in (mask, weights, *priors, *checkpoints):
            register.check_file(inputs.real_place(file), file)
    present = [path for path in (mask, *priors, weights) if os.path.lexists(path)]
    foreign = [path for path in present if not (is_weights_file(path) if path == weights else is_mask_file(path))]
    if foreign:
        raise UserError(
            f"{listing([str(path) for path in foreign])} would be replaced, and is not a "
            f"{'file of trained weights' if foreign == [weights] else 'mask'} of leap_pl. Name another folder with "
            "--checkpoint.dirpath or --mask_export.folder."
        )
    if resumes or not (checkpoints or mask in present) or (last and not checkpoints):
        return []
    if not force:
        found = listing([path.name for path in (*checkpoints, *([mask] if mask in present else []))], 4)
        remedy = "Add --ckpt_path last to resume it, or --force to replace it, or name another folder with "
        remedy += "--checkpoint.dirpath."
        if register is None:  # a program
            remedy = "Resume it with trainer.fit(..., ckpt_path=FILE), name another dirpath, or remove the folder."
        raise UserError(f"{folder if checkpoints else masks} holds another run ({found}). {remedy}")
    recorded = records.recorded(folder)
    foreign = [path for path in checkpoints if path.name not in recorded and not _is_ours(path, folder)]
    if foreign:
        raise UserError(
            f"{folder} holds checkpoints that leap_pl did not write, or that were changed since: "
            f"{listing([path.name for path in foreign], 4)}. --force removes only what an earlier run wrote; move them "
            "away, or name another folder with --checkpoint.dirpath."
        )
    record = [folder / records.RECORD] if (folder / records.RECORD).exists() else []
    return [Leftover.of(path) for path in (*checkpoints, *present, *record)]


def _is_ours(path: Path, folder: Path) -> bool:
    """Return whether a checkpoint is of leap_pl: a file, a sharded run's folder, or a link to one in ``folder``."""
    if path.is_symlink():
        return inputs.real_path(path).parent == inputs.real_path(folder)
    return is_checkpoint(path / META if path.is_dir() else path)


def record_checkpoint(folder: Path, name: str) -> None:
    """Add the checkpoint ``name``, which is about to be written, to the record of its run in ``folder``.

    A failure to write the record is ignored: an intact checkpoint is recognised without it.
    """
    text = records.extended(folder, "fit", [name, LAST], job=os.environ.get("SLURM_JOB_ID"))
    with suppress(UserError), atomic_file(folder / records.RECORD, own=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def begun_by_this_job(folder: Path) -> bool:
    """Return whether the run in ``folder`` was started by this SLURM job before it was requeued."""
    return records.job_of(folder) == os.environ.get("SLURM_JOB_ID")


def link_last(folder: Path, file: Path) -> None:
    """Point ``last.ckpt`` in ``folder`` at the checkpoint ``file`` there, if a killed run has left an older link."""
    file, link = inputs.real_path(file), folder / LAST
    if (
        file.parent == inputs.real_path(folder)
        and (link.is_symlink() or not link.exists())
        and inputs.real_path(link) != file
    ):
        try:
            atomic_link(link, file)
        except OSError:  # a file system without links, where a save has copied it
            if file.is_file():
                with atomic_file(link, own=True) as copy:
                    shutil.copyfile(file, copy)


def finished_mask(checkpoint: dict[str, Any], masks: Path, settings: Mapping[str, Any]) -> tuple[Path, Identity] | None:
    """Return the path and identity of a finished run's mask, or None if the run is unfinished or has other settings.

    Args:
        checkpoint: Newest checkpoint of the run.
        masks: Folder of the run's mask.
        settings: Requested settings: plain values by their names in :mod:`leap_pl.checkpoints.settings`.
    """
    max_steps = settings.get("trainer.max_steps")
    done = checkpoint.get("global_step")
    if KEY not in checkpoint or not isinstance(done, int) or done < int(max_steps or 0):
        return None
    identity, path = read_identity(checkpoint), masks / MASK
    stored = identity.learned_with
    if identity.max_steps != max_steps or not all(_as_asked(name, stored[name], settings) for name in stored):
        return None
    if not _is_of_mask(identity, settings.get("model.mask")):
        return None
    try:
        with inputs.command_inputs("is it finished"):  # not an input of the run, which may write this mask
            provenance = MaskSet.load(path).provenance
    except UserError:
        return None
    if TRAINED in provenance.config and not (masks / WEIGHTS).is_file():
        return None  # the run writes them again
    found = (provenance.fingerprint, provenance.sparsity, provenance.config.get("max_steps"))
    return (path, identity) if found == (identity.fingerprint, identity.sparsity, max_steps) else None


def _is_of_mask(identity: Identity, mask: Any) -> bool:
    """Return whether a run was under the ``mask`` that is named, if one is; True if in doubt."""
    digests = identity.settings.get(DIGESTS)
    was = digests.get("prior") if isinstance(digests, dict) else None
    if mask is None or was is None:
        return True
    try:
        with inputs.command_inputs("is it finished"):
            return MaskSet.load(str(mask)).digest_of_bits() == was
    except UserError:  # it is gone, or of the hub, which cannot be reached
        return True


def _as_asked(name: str, stored: Any, settings: Mapping[str, Any]) -> bool:
    """Return whether a setting that affects learning is requested as it was; False if in doubt."""
    if RULES.get(name) != "fixed" or settings.get(name) == "auto":
        return True
    return not differences(name, _normal(stored), _normal(settings.get(name)))


def _normal(value: Any) -> Any:
    """Return ``value`` without the settings that are not set, and with a class path reduced to the class name."""
    if not isinstance(value, dict):
        return value
    given = {name: one for name, one in value.items() if one is not None and one != [] and one != ()}
    if isinstance(value.get("class_path"), str):
        given["class_path"] = value["class_path"].rpartition(".")[2]
    return given


def tidy(folder: Path, newest: Path) -> None:
    """Clean up a finished run's ``folder``: remove partial files, and point ``last.ckpt`` at ``newest``."""
    with suppress(OSError, UserError):  # a read-only folder
        remove_abandoned(folder)
        link_last(folder, newest)


def replaces(settings: Any, *, requeued: bool) -> bool:
    """Return whether a run replaces the contents of its folder: ``--force``, but only once in a requeued job.

    Args:
        settings: Settings of fit, with ``force``, ``ckpt_path`` and ``checkpoint.dirpath``.
        requeued: Whether SLURM has restarted this job.

    Raises:
        UserError: If ``--ckpt_path last`` is given as well.
    """
    folder = settings.checkpoint.dirpath
    if settings.force and settings.ckpt_path == "last":
        raise UserError(
            f"--force replaces the run in {folder}, and --ckpt_path last resumes it. Choose one: leave out --force, or "
            "--ckpt_path."
        )
    return bool(settings.force) and not (requeued and folder and begun_by_this_job(expanded(folder)))


def check_settings(settings: Any, *, force: bool, last: bool) -> None:
    """Check the folder of a run by :func:`earlier_run` before anything is loaded, if the settings name the folder.

    Raises:
        UserError: As :func:`earlier_run`.
    """
    options = {key: value for key, value in settings.as_dict().items() if key not in ("ckpt_path", "checkpoint")}
    inputs.note_named(options)
    if settings.checkpoint.dirpath is None or "://" in settings.checkpoint.dirpath:
        return
    folder = expanded(settings.checkpoint.dirpath)
    earlier_run(folder, masks_of(settings), ckpt_path=settings.ckpt_path, force=force, last=last)


def check_finished(settings: Any, newest: Path, checkpoint: dict[str, Any]) -> None:
    """Raise :class:`Finished` if the run to resume is finished and was requested with the same settings.

    Raises:
        Finished: If so; the message says where its mask is.
    """
    masks, folder = masks_of(settings), expanded(settings.checkpoint.dirpath)
    requested = {f"{group}.{name}": value for group in _GROUPS for name, value in settings[group].as_dict().items()}
    found = finished_mask(checkpoint, masks, requested)
    if found is not None:
        tidy(folder, newest)
        mask, identity = found
        step = checkpoint["global_step"]
        raise Finished(
            f"the run in {folder} is finished: {newest.name} (step {step}) is its last checkpoint, and its mask, of "
            f"sparsity {identity.sparsity:g}, is {mask}."
        )


def masks_of(settings: Any) -> Path:
    """Return the folder of the prior and mask of a run whose settings have a ``checkpoint.dirpath``."""
    return expanded(settings.mask_export.folder or settings.checkpoint.dirpath)
