"""The checkpoint that ``--ckpt_path`` names: a file, a folder, or the last one of a run; and the settings in it."""

from pathlib import Path
from typing import Any

from leap_pl.checkpoints.identity import Identity
from leap_pl.checkpoints.newest import newest_checkpoint
from leap_pl.errors import UserError
from leap_pl.gates import FixedGate
from leap_pl.inputs.paths import expanded
from leap_pl.training.run_settings import find_classes, read_settings, take_terms, without_revision

LINKED = ("data.tokenizer", "data.tokenizer_revision")  # set by the model's settings


def find_last(verb: str, folder: str | None) -> tuple[str, tuple[Path, dict[str, Any]] | None]:
    """Return a message on what the run starts from, and the newest intact checkpoint in ``folder`` or None.

    Raises:
        UserError: There is no folder; or it has no intact checkpoint, and ``verb`` is not ``fit``.
    """
    if folder is None:
        raise UserError(
            "to resume from the last checkpoint (--ckpt_path last, or a requeued job), its folder must be the same in "
            "every run. Set it with --checkpoint.dirpath."
        )
    found = newest_checkpoint(expanded(folder))
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
    place = expanded(ckpt_path)
    if place.exists():
        return str(place.absolute()) if keyword or ckpt_path.startswith("~") else ckpt_path
    if not keyword:
        raise UserError(f"{ckpt_path}: there is no such checkpoint. Give a .ckpt from a run's checkpoints folder.")
    raise UserError(
        f"--ckpt_path {ckpt_path} is no checkpoint. Give a .ckpt from a run's checkpoints folder, or last for the "
        "newest in --checkpoint.dirpath."
    )


def check_verb(identity: Identity, path: str, name: str, *, fixes: bool) -> None:
    """Check that a checkpoint to resume from is of the verb that is running.

    Args:
        identity: Identity in the checkpoint.
        path: Path of the checkpoint, for the message.
        name: Name of the verb that is running.
        fixes: Whether that verb leaves the mask as it is.

    Raises:
        UserError: It is of the other verb.
    """
    fixed = identity.gate["class_path"] == FixedGate.__name__
    if fixed != fixes:
        made, mask = ("recover", "fixed") if fixed else ("fit", "learned")
        raise UserError(
            f"{path} is a checkpoint of leap_pl {made}, whose mask is {mask}, and this is leap_pl {name}. "
            f"To resume that run, type leap_pl {made}."
        )


def settings_of(
    identity: Identity, checkpoint: dict[str, Any], path: str, words: list[str], base_model: str | None
) -> tuple[dict[str, Any], dict[str, UserError]]:
    """Return the settings that a checkpoint was learned with, in the form of a config.

    Args:
        identity: Identity in the checkpoint.
        checkpoint: Content of the checkpoint.
        path: Path of the checkpoint, for messages.
        words: Words of the command line.
        base_model: Base model that they or a config name; the stored revision is of the stored one alone.

    Returns:
        Full name of each setting that can be taken → its value, and name of each that cannot be taken → the error to
        raise unless the setting is typed.
    """
    settings = without_revision(read_settings(identity, checkpoint, path), base_model)
    classes, refused = find_classes(settings, path)
    settings |= {name: _as_typed(*each) for name, each in classes.items()}
    refused |= take_terms(settings, path, _as_typed)
    if any(word.startswith("--model.objective.extra+") for word in words):
        # Typed terms are added to an empty list, as at the start of the run, not to the checkpoint's.
        settings["model.objective"] = {**settings["model.objective"], "extra": []}
    return {name: value for name, value in settings.items() if name not in LINKED and name not in refused}, refused


def _as_typed(kind: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a class and its arguments in the form of a config."""
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}
