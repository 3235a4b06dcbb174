"""Layout of leap_pl's Lightning checkpoints, and reading them without the model.

In addition to Lightning's own entries (optimizer, schedules, loops, data position):

==================  ======================================================================================
``state_dict``      ``logits.<weight name>`` → logits, and in the same form the other tensors that the kind
                    of gate stores (:meth:`leap_pl.gates.Gate.stored`) and the parameters of trained
                    weights, ``trained.<part>.<weight name>``; nothing of the frozen model
``leap_pl``         the fields of :class:`leap_pl.checkpoints.identity.Identity`, plain values
==================  ======================================================================================

The optimizer state is keyed by the names of parameters, not by their indices, so that single-process and distributed
runs, with the model sharded or not, read one another's files. Under ``ModelParallelStrategy`` with
``save_distributed_checkpoint`` a checkpoint is a folder instead: see :mod:`leap_pl.checkpoints.folder`.
"""

import errno
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leap_pl.checkpoints.identity import KEY, Identity, read_identity
from leap_pl.checkpoints.rewind import batch_counts
from leap_pl.errors import UserError, listing, one_line
from leap_pl.gates import PART, Gates, Stored, restore
from leap_pl.inputs.paths import expanded
from leap_pl.inputs.register import note_input
from leap_pl.masks import MaskSet, PackedMasks, Provenance
from leap_pl.masks.mask_set import STAYED, installed_versions

LOGITS = "logits"
_FOLDER = 0x10  # attribute bit of a zip archive's record that marks it as a folder
LAST = "last.ckpt"  # link to the newest
# Errors of a file that is not damaged by them.
OF_THE_SYSTEM = {errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE}
META = "meta.pt"  # file in a checkpoint folder with everything but tensors


class UnreadableError(UserError):
    """Error of a checkpoint that the system does not let be read now, and that may be intact."""


def check_readable(path: str | Path, error: BaseException) -> None:
    """Check that ``error`` of a reader is not the system's: a reader may call such a file damaged, as zipfile does.

    Raises:
        UnreadableError: It is.
    """
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError) and cause.errno in OF_THE_SYSTEM:
            raise UnreadableError(
                f"{path} cannot be read now ({cause.strerror}). Check its permissions and its disk, and try again."
            ) from error


def provenance(identity: Identity, gates: Gates[Any]) -> Provenance:
    """Return the provenance of the mask that a run with this ``identity`` exports from its ``gates``."""
    fields = asdict(identity)
    config = {"pattern": gates.form}
    config |= {key: fields[key] for key in ("gate", "targets", "ignore", "max_steps")} | identity.settings
    fixed = identity.settings.get(STAYED)
    return Provenance(
        base_model=identity.base_model,
        revision=identity.revision,
        fingerprint=identity.fingerprint,
        method=fixed["method"] if isinstance(fixed, dict) else gates.first.method,
        sparsity=identity.sparsity,
        config=config,
        versions=installed_versions(),
    )


def count_for_ranks(checkpoint: dict[str, Any], found: Identity, expected: Identity) -> None:
    """Convert the batch counters of ``checkpoint``, in place, to this run's number of ranks.

    Lightning counts the batches of one rank, so that with fewer ranks each has processed more; the position in the text
    is stored for all ranks together.

    Raises:
        UserError: If the number of ranks differs, and the checkpoint was written within an optimizer step.
    """
    if found.ranks in (None, expected.ranks) or expected.ranks is None or found.accumulation is None:
        return
    for counts in batch_counts(checkpoint):
        done = counts["processed"]
        if done % found.accumulation or counts["ready"] != done:
            raise UserError(
                f"the checkpoint was written within an optimizer step of {found.ranks} ranks and lacks the gradients "
                f"accumulated so far. Resume on {found.ranks} ranks, or from a checkpoint between two steps."
            )
        # 0 or 1: a batch at whose end the checkpoint was written does not count as completed yet.
        open_batches = done - counts["completed"]
        done = done * found.ranks // expected.ranks
        counts.update(ready=done, started=done, processed=done, completed=done - open_batches)


def path_of(name: str, part: str = "logits") -> str:
    """Return the key of the logits, or another stored ``part``, of the weight ``name`` in a LeapModule's state dict."""
    module, _, tensor = name.rpartition(".")
    return f"model.{module}.parametrizations.{tensor}.0.{part}"


def key_of(name: str, part: str) -> str:
    """Return the name in a checkpoint of the stored ``part`` of the weight ``name``."""
    return f"{part}.{name}"


def by_weight(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gates' tensors of a LeapModule's state dict by their checkpoint keys, ``<part>.<weight name>``."""
    form = re.compile(r"model\.(.+)\.parametrizations\.(\w+)\.0\.([\w.]+)")
    matches = ((form.fullmatch(path), tensor) for path, tensor in state.items())
    return {key_of(f"{match[1]}.{match[2]}", match[3]): tensor for match, tensor in matches if match}


def by_path(
    stored: Mapping[str, Tensor], places: Iterable[tuple[str, str]], *, whole: bool = False
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by their names in a LeapModule's state dict.

    Args:
        stored: Tensors by their checkpoint keys.
        places: (weight name, part) of those that the module has.
        whole: Whether the checkpoint may have no further trained weights.

    Raises:
        UserError: One is missing, or there are further ones.
    """
    keys = {key_of(*place): place for place in places}
    absent = sorted({name for key, (name, _) in keys.items() if key not in stored})
    if absent:
        raise UserError(
            f"the checkpoint lacks what this run learns of {listing(absent, 3)}. Use the gate and the train_weights "
            "that it was made with."
        )
    more = sorted(
        key.removeprefix(PART).partition(".")[2] for key in stored if key.startswith(PART) and key not in keys
    )
    if whole and more:
        raise UserError(
            f"the checkpoint has trained weights of {listing(more, 3)}, which this run does not train. Use the "
            "train_weights that it was made with; leap_pl export --ckpt_path takes a checkpoint of any version."
        )
    return {path_of(*place): stored[key] for key, place in keys.items()}


def keep_learned_only(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Remove the frozen model from a LeapModule's state dict, before a strategy gathers it from all ranks."""
    kept = {prefix + path_of(*place) for place in module.stored()}
    for name in [name for name in state if name not in kept]:
        del state[name]


def names_of_parameters(module: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> list[str]:
    """Return the names in ``module`` of the parameters of its ``optimizers``, in their order there."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [names[id(parameter)] for group in groups for parameter in group["params"]]


def name_parameters(state: dict[str, Any], names: Sequence[str]) -> None:
    """Replace parameter indices in an optimizer's state dict by ``names``, in place."""

    def name(key: int | str) -> str:
        return names[key] if isinstance(key, int) else key

    if state:
        state["state"] = {name(key): value for key, value in state["state"].items()}
        groups = state["param_groups"]
        state["param_groups"] = [{**group, "params": [name(key) for key in group["params"]]} for group in groups]


def order_parameters(state: dict[str, Any], names: Sequence[str]) -> None:
    """Put the parameters of every group of an optimizer's state dict into the order of ``names``, in place.

    An optimizer takes states by the position of their parameters. A sharded run has the norms in another order.
    """
    places = {name: place for place, name in enumerate(names)}
    for group in state.get("param_groups", ()):
        if places.keys() >= set(group["params"]):
            group["params"] = sorted(group["params"], key=places.__getitem__)


def load_checkpoint(path: str | Path, *, mmap: bool = True, check_tensors: bool = True) -> dict[str, Any]:
    """Read a checkpoint file, or all but the tensors of a checkpoint folder, without running code from it.

    Every bit of a file is verified by its checksum.

    Args:
        path: Checkpoint file or folder.
        mmap: Memory-map the tensors instead of reading them. The file must then stay in place.
        check_tensors: Verify the tensors' bits as well; False if only plain values are read, which is fast.

    Returns:
        Contents of the checkpoint, in CPU memory.

    Raises:
        UserError: If ``path`` does not exist, is truncated or damaged, or is not a checkpoint of leap_pl.
    """
    path = expanded(path)
    note_input(path)
    if (path / META).is_file():
        path = path / META
    inside = sorted(item.name for item in path.glob("*.ckpt"))
    if inside:
        raise UserError(f"{path} is a folder, not a checkpoint. Give one of the .ckpt in it: {listing(inside, 4)}.")
    if path.suffix == ".safetensors":
        raise UserError(f"{path} is not a checkpoint. Give a mask with --mask, or a .ckpt of the run.")
    if not path.is_file():
        raise UserError(f"{path}: there is no such checkpoint. Give a .ckpt from a run's checkpoints folder.")
    try:
        damaged = _damaged_record(path, check_tensors)
        if damaged is not None:
            raise UserError(f"{path} is damaged ({damaged}). Take the checkpoint before it.")
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged, or holds more than tensors and plain values, and leap_pl runs no code from a "
            "checkpoint. Give a .ckpt that leap_pl fit wrote."
        ) from error
    except Exception as error:  # a damaged file can make the readers raise anything
        check_readable(path, error)
        raise UserError(f"{path} is truncated, damaged or not a checkpoint. Take the checkpoint before it.") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is not a checkpoint of leap_pl fit. Give a .ckpt from a run's checkpoints folder.")
    if _bytes_of([checkpoint.get(part) for part in ("state_dict", "optimizer_states")]) > path.stat().st_size:
        raise UserError(f"{path} is damaged (its tensors are larger than the file). Take the checkpoint before it.")
    return checkpoint


def _bytes_of(tree: Any) -> int:
    """Return the bytes that all tensors of ``tree`` take as values of their own.

    A tensor may be stored as a view of one element, or of what others are stored in: a small file would then make
    whoever computes with it allocate any amount of memory.
    """
    total, seen, rest = 0, set[int](), [tree]
    while rest:
        value = rest.pop()
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size() if value.numel() > 1 else 0
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:  # a pickle may contain itself
            seen.add(id(value))
            rest.extend(value.values() if isinstance(value, Mapping) else value)
    return total


def is_checkpoint(path: Path) -> bool:
    """Return whether the file ``path`` can be read as a checkpoint of leap_pl, without verifying its checksums."""
    try:
        found = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception:  # another file can make the readers raise anything
        return False
    return isinstance(found, dict) and KEY in found


def _damaged_record(path: Path, tensors: bool) -> str | None:
    """Return what is wrong with the first damaged record of a checkpoint, or None.

    A checkpoint is a zip archive of uncompressed records, each with a CRC-32. torch.load does not check these: it would
    read a flipped bit as another logit.
    """
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.external_attr & _FOLDER:
                # torch.load does not read a record that is marked as a folder, and returns uninitialized memory.
                return f"{record.filename} is compressed or marked as a folder, which torch.save never does"
        if not tensors:
            for record in archive.infolist():
                if not re.search(r"/data/\d+$", record.filename):
                    archive.read(record)  # a record of plain values; raises if its checksum does not match
            return None
        name = archive.testzip()
    return None if name is None else f"{name} does not match its checksum"


def masks_from_checkpoint(path: str | Path) -> MaskSet:
    """Return the hard mask, at exactly the run's target sparsity, of the logits in the checkpoint ``path``.

    Its provenance contains the step of the checkpoint, ``steps``, which is ``max_steps`` only if learning is finished.

    To save memory, the logits of a folder are read one weight at a time, several times.

    Raises:
        UserError: If the checkpoint cannot be read, or lacks logits.
    """
    checkpoint = load_checkpoint(path)
    identity = read_identity(checkpoint, path)
    try:
        tensors, read = tensors_of(checkpoint, path)
        steps = checkpoint.get("global_step")
        known = (
            replace(identity, settings={"steps": steps, **identity.settings}) if isinstance(steps, int) else identity
        )
        gates = _restored(tensors, identity, path, read)
        gates.choose(identity.sparsity)
        masks = PackedMasks.of((name, gate.hard_mask()) for name, gate in gates.items())
        return MaskSet(masks, provenance(known, gates))
    except UserError:
        raise
    except Exception as error:  # an identity that does not match the logits can make anything fail
        raise UserError(
            f"{path} holds logits that do not fit its own settings ({one_line(error, 120)}). "
            "Take the checkpoint before it."
        ) from error


def tensors_of(
    checkpoint: Mapping[str, Any], path: str | Path
) -> tuple[Mapping[str, Tensor], Callable[[str], Tensor] | None]:
    """Return the tensors of ``checkpoint``, loaded from ``path``: of a folder, empty ones and what reads one of them.

    Raises:
        UserError: A folder is damaged, or lacks a part.
    """
    path = expanded(path)
    if not path.is_dir():
        return checkpoint.get("state_dict", {}), None
    from leap_pl.checkpoints.folder import StoredTensors

    stored = StoredTensors(path)
    return stored.shapes, stored.read


def _restored(
    logits: Mapping[str, Tensor], identity: Identity, path: str | Path, read: Callable[[str], Tensor] | None
) -> Gates[Any]:
    """Return the gates of a checkpoint, without their model."""
    check_complete(identity, logits, path)

    held: dict[str, dict[str, Tensor]] = {}  # weight name → part of its gate → tensor
    for key, tensor in logits.items():
        part, _, name = key.partition(".")
        held.setdefault(name, {})[part] = tensor

    def stored_of(name: str, shape: list[int]) -> Stored:
        reader = None if read is None else lambda part: read(key_of(name, part))
        parts = held.get(name, {})
        return Stored(parts.pop(LOGITS, None), tuple(shape), identity.input_dims[name], parts, reader)

    stored = {name: stored_of(name, shape) for name, shape in identity.shapes.items()}
    return restore(identity.gate["class_path"], identity.gate["init_args"], stored)


def check_complete(identity: Identity, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Check that a checkpoint holds the mask of every weight: its logits or, of a fixed mask, its bits.

    Args:
        identity: Identity in the checkpoint.
        tensors: Its tensors, by their checkpoint keys.
        path: Path of the checkpoint, for the message.

    Raises:
        UserError: It does not.
    """
    held = {key.partition(".")[2] for key in tensors}
    missing = [name for name in identity.shapes if name not in held]
    if missing:
        raise UserError(f"{path} lacks the logits of {listing(missing, 3)}. Take the checkpoint before it.")
