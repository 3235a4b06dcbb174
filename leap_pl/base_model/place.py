"""Where a base model is: a hub id, a folder or a GGUF file; and what fails when it is read, in one line."""

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError

from leap_pl.base_model.gguf_structure import GgufFile, read_structure
from leap_pl.base_model.model_sizes import check_settings
from leap_pl.base_model.stored_weights import StoredWeights, check_sizes, read_settings, read_shapes
from leap_pl.errors import UserError, is_out_of_memory, listing, one_line
from leap_pl.inputs.hub import check_reachable, fetch_optional, gated
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.plain_values import shown
from leap_pl.inputs.records import mask_in
from leap_pl.inputs.register import exists, note_input, real_path

_folders: dict[Path, TemporaryDirectory[str]] = {}  # GGUF file → the folder in which it is alone

_CLEAR_ERRORS = OSError | ValueError | RuntimeError | SafetensorError  # messages that need no class name


def model_of(
    typed: tuple[str | None, str | None], recorded: tuple[str, str | None], *, trust_remote_code: bool
) -> tuple[str, str | None]:
    """Return the base model to load: what is ``typed``, and else what is ``recorded`` in a mask or checkpoint.

    Args:
        typed: Name and revision that are typed; None where they are not.
        recorded: Name and revision in the file; that revision is valid for that name only.
        trust_remote_code: Whether code of the model is to be run.

    Returns:
        Name and revision.

    Raises:
        UserError: Only the recorded name is known, and it is a path of nothing; or code of the model is to be run. A
            file of unknown origin must not choose whose code runs.
    """
    (name, revision), (recorded_name, recorded_revision) = typed, recorded
    if not revision and name in (None, recorded_name):
        revision = recorded_revision
    if trust_remote_code:
        of_file = {"--model": recorded_name if name is None else None}
        check_trusted(of_file | {"--revision": None if typed[1] else revision})
    if name is None and _looks_local(recorded_name) and not exists(expanded(recorded_name)):
        raise UserError(
            f"the base model is recorded as {shown(recorded_name)}, which is not there from this folder. Give its "
            "place with --model."
        )
    return recorded_name if name is None else name, revision


def check_trusted(recorded: Mapping[str, str | None]) -> None:
    """Check that no file says by itself whose code is run.

    Args:
        recorded: Option → its value, of those that say which model is loaded, if that value is a file's; else None.

    Raises:
        UserError: A file says one.
    """
    for option, value in recorded.items():
        if value is not None:
            setting = option.rpartition(".")[2].lstrip("-")
            what = {"revision": "revision", "weights": "folder of weights"}.get(setting, "name")
            typed = f"{option} NAME" if option.startswith("--") else f"{option}=NAME"
            raise UserError(
                f"trust_remote_code runs code of the base model, whose {what} comes only from a file: {shown(value)}. "
                f"Confirm it with {typed}."
            )


def locate(name: str) -> tuple[str, str | None]:
    """Return the folder or hub id to pass to transformers, and the name of the GGUF file in it, if any.

    A GGUF file is the whole model: its folder is one of this process, with the file alone. What lies beside the file,
    such as a tokenizer, is of another model, and transformers would take it.

    Raises:
        UserError: ``name`` is a path, at which there is no model.
    """
    path = expanded(name)
    note_input(path)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError(f"base model {name}: there is no such GGUF file. Give the path of one that exists.")
        return _alone(real_path(path)), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"base model {name}: the folder holds no config.json (found: "
                f"{listing(sorted(p.name for p in path.iterdir()), 6)}). {_instead(name)}"
            )
        return str(path), None
    if path.is_file():
        flag = {
            ".safetensors": " Give a mask with --mask (of recover: --model.mask).",
            ".ckpt": " Give a checkpoint with --ckpt_path.",
        }
        raise UserError(
            f"base model {name} is a file. Give a Hugging Face model folder, a .gguf file or a hub id."
            f"{flag.get(path.suffix, '')}"
        )
    if _looks_local(name) or path.exists():
        raise UserError(
            f"base model {name}: there is no such folder. Give a Hugging Face model folder, a .gguf file or a hub id."
        )
    if "/" not in name and "@" not in name:
        raise UserError(
            f"base model {name}: there is no such folder, and an id of the hub names an owner too. Give it in full, "
            "with --model (of fit and recover: --model.base_model), as openai-community/gpt2 for gpt2."
        )
    if "@" in name:  # as a mask of the hub is named
        alone, _, revision = name.partition("@")
        raise UserError(
            f"base model {name}: a revision is an option of its own. Give {alone} --revision {revision} (of fit and "
            "recover: --model.revision)."
        )
    return name, None


def _alone(file: Path) -> str:
    """Return a folder that lasts as long as this process, with only a link to ``file``."""
    made = _folders.get(file)
    if made is None or not Path(made.name, file.name).is_file():  # it may have been cleared as old
        made = _folders[file] = TemporaryDirectory(prefix="leap_pl-gguf-", ignore_cleanup_errors=True)
        Path(made.name, file.name).symlink_to(file)
    return made.name


def _instead(name: str) -> str:
    """Return what to type in place of the folder ``name``, in which there is no model itself."""
    if (expanded(name) / "model" / "config.json").is_file():  # as of prune, with a method that updates weights
        return f"Give {Path(name) / 'model'}."
    if mask_in(name).is_file():
        return (
            f"It has a mask, which evaluate and export take: --mask {name}. leap_pl export --mask {name} --output_dir "
            "FOLDER makes a model of it."
        )
    return "Give a Hugging Face model folder, a .gguf file or a hub id."


def _looks_local(name: str) -> bool:
    """Return whether ``name`` is a path, whatever is there, and no hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def check_in_reach(folder: str, revision: str | None) -> None:
    """Check that the hub answers, if ``folder`` is a hub id, and that the settings of the model there are plausible.

    Raises:
        UserError: They are not.
        Exception: The hub client's error, if the hub does not answer.
    """
    if Path(folder).is_dir():
        return
    check_reachable(folder, revision=revision)
    found = fetch_optional(folder, "config.json", revision)
    if found is not None:
        check_settings(read_settings(found.parent), None, folder)


def check_description(name: str, folder: str, gguf_file: str | None) -> None:
    """Check that the settings of a local model are plausible before anything uses them."""
    if gguf_file is not None:
        metadata = _structure(folder, gguf_file).metadata
        parts = metadata.get("split.count")
        if isinstance(parts, int) and parts > 1:
            raise UserError(
                f"base model {name} is one of {parts} parts of a GGUF file. Join them with llama-gguf-split --merge, "
                "and give the whole file."
            )
        family = f"{metadata.get('general.architecture')}."
        settings = {key.removeprefix(family): value for key, value in metadata.items() if key.startswith(family)}
        numbers = {key: value for key, value in settings.items() if not isinstance(value, tuple)}
        check_settings(numbers, stored_weights(folder, gguf_file), name)
    elif Path(folder).is_dir():
        check_sizes(Path(folder))
        check_settings(read_settings(Path(folder)), stored_weights(folder, None), name)


def stored_weights(folder: str, gguf_file: str | None) -> StoredWeights | None:
    """Return the tensor shapes in the files of a local model; None for a model on the hub."""
    if gguf_file is not None:
        return _structure(folder, gguf_file).stored
    return read_shapes(Path(folder)) if Path(folder).is_dir() else None


def stored_dtype(folder: str, gguf_file: str) -> str:
    """Return the name of the data type in which a GGUF file stores its decoder blocks; bfloat16 if quantised."""
    return _structure(folder, gguf_file).plain or "bfloat16"


def _structure(folder: str, gguf_file: str) -> GgufFile:
    path = real_path(Path(folder) / gguf_file)  # which messages name, and not the link
    found = path.stat()
    return _structure_of(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=1)
def _structure_of(path: Path, changed: int, size: int) -> GgufFile:
    return read_structure(path)


@contextmanager
def reading(what: str, name: str, *, trusted: bool) -> Iterator[None]:
    """Convert the errors of the hub client and the readers into one line that says what to do.

    A damaged file can make them raise any exception, so that all are attributed to the file. Only readers may be called
    inside, so that no bug of this package is reported as a damaged file.

    Args:
        what: What is read, for the message.
        name: Its name.
        trusted: Whether code that comes with it is run.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        panicked = type(error).__name__ == "PanicException"  # from a reader in Rust; not a subclass of Exception
        if not panicked and not isinstance(error, Exception):
            raise
        if is_out_of_memory(error):
            raise UserError(
                f"{what} {name}: there is not enough memory to load it. Use a smaller model, bfloat16, or a machine "
                "with more."
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"{what} {name} is a pickle that is damaged or contains more than tensors; leap_pl runs no code from a "
                "model's files. Give the model as safetensors."
            ) from error
        if refused := gated(error):
            raise UserError(f"{what} {name} could not be fetched from the hub: {refused}") from error
        if "trust_remote_code" in str(error) and not trusted:
            raise UserError(
                f"{what} {name} comes with code of its own, which is not run unless you allow it. Read that code; if "
                "you trust it, add --trust_remote_code true (fit, recover, validate: --model.trust_remote_code true, "
                "for the base model and its own tokenizer)."
            ) from error
        reason = one_line(error)
        if not isinstance(error, _CLEAR_ERRORS) and str(error):
            reason = f"{type(error).__name__}: {reason}"
        reason = re.sub(r" for this kind of AutoModel.*", ", which is not a causal language model.", reason)
        reason = f"{reason.removesuffix('.')}." if len(reason) <= 300 else f"{reason[:300]} …"
        local = expanded(name).exists()
        remedy = "Check that the files are complete."
        if not local:
            remedy = "Check the id and the network, or give a local folder or .gguf file."
        if not local and name.startswith("assets/"):
            remedy = f"There is no folder {name} here: in a clone of leap_pl, make assets lays it out."
        raise UserError(
            f"{what} {name} could not be {'read' if local else 'fetched from the hub'}: {reason} {remedy}"
        ) from error
