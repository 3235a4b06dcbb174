"""The checkpoint that ``--ckpt_path`` names: a file, a folder, or the last one of a run."""

from pathlib import Path
from typing import Any

from leap_pl.checkpoints.newest import newest_checkpoint
from leap_pl.errors import UserError


def find_last(verb: str, folder: str | None) -> tuple[str, tuple[Path, dict[str, Any]] | None]:
    """Return a message on what the run starts from, and the newest intact checkpoint in ``folder`` or None."""
    if folder is None:
        raise UserError(
            "to resume from the last checkpoint (--ckpt_path last, or a requeued job), its folder must be the same in "
            "every run. Set it with --checkpoint.dirpath."
        )
    found = newest_checkpoint(Path(folder).expanduser())
    if found is None and verb != "fit":
        raise UserError(f"there is no checkpoint in {folder}. Give another --checkpoint.dirpath, or a .ckpt file.")
    if found is None:
        words = f"no checkpoint in {folder} yet: starting a new run."
    else:
        file, checkpoint, damaged = found
        words = f"resuming from {file} (step {checkpoint.get('global_step')})."
        if damaged:
            words = f"{damaged[0]} Fallback: {words}"
    return words, None if found is None else found[:2]


def checkpoint_path(ckpt_path: Any) -> Any:
    """Return ``ckpt_path`` as a path; Lightning's keywords other than ``last`` are refused.

    Raises:
        UserError: The file or folder does not exist.
    """
    if not isinstance(ckpt_path, str) or ckpt_path == "last" or "://" in ckpt_path:
        return ckpt_path
    keyword = ckpt_path in ("best", "hpc") or ckpt_path.startswith("registry")
    if Path(ckpt_path).exists():
        return str(Path(ckpt_path).absolute()) if keyword else ckpt_path
    if not keyword:
        raise UserError(f"{ckpt_path}: there is no such checkpoint. Give a .ckpt from a run's checkpoints folder.")
    raise UserError(
        f"--ckpt_path {ckpt_path} is no checkpoint. Give a .ckpt from a run's checkpoints folder, or last for the "
        "newest in --checkpoint.dirpath."
    )
