"""What a Lightning checkpoint of leap_pl holds, and how it is read without the model.

Beside Lightning's own entries (optimizer, schedules, loops, data position):

==================  ======================================================================================
``state_dict``      ``logits.<weight name>`` → logits, and in the same form what else the kind of
                    gate stores (:meth:`leap_pl.gates.Gate.stored`); nothing of the frozen model
``leap_pl``         the fields of :class:`leap_pl.checkpoints.identity.Identity`, plain values
==================  ======================================================================================

The optimizer's state goes by the names of parameters, not by their numbers, so that one process and many, with
the model sharded or not, read one another's files. Under ``ModelParallelStrategy`` with
``save_distributed_checkpoint`` a checkpoint is a folder instead: see :mod:`leap_pl.checkpoints.folder`.
"""

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leap_pl.checkpoints.identity import KEY, Identity, read_identity
from leap_pl.checkpoints.rewind import batch_counts
from leap_pl.errors import UserError, listing
from leap_pl.gates import Gate, Stored, gate_kind, restore
from leap_pl.inputs.register import note_input
from leap_pl.masks.mask_set import MaskSet, PackedMasks, Provenance, installed_versions

PREFIX = "logits."
_FOLDER = 0x10  # of the attributes of a file in a zip archive
META = "meta.pt"  # of a folder: everything but tensors


def describe_gate(gate: Gate) -> dict[str, Any]:
    """The class of a gate and the settings it was made with."""
    return {"class_path": type(gate).__name__, "init_args": gate.settings()}


def provenance(identity: Identity) -> Provenance:
    """The provenance of the mask that a run with this ``identity`` exports."""
    told = asdict(identity)
    kind = gate_kind(identity.gate["class_path"])
    config = {"pattern": kind.form(identity.gate["init_args"])}
    config |= {key: told[key] for key in ("gate", "targets", "ignore", "max_steps")} | identity.settings
    return Provenance(
        base_model=identity.base_model,
        revision=identity.revision,
        fingerprint=identity.fingerprint,
        method=kind.method,
        sparsity=identity.sparsity,
        config=config,
        versions=installed_versions(),
    )


def count_for_ranks(checkpoint: dict[str, Any], found: Identity, expected: Identity) -> None:
    """Count the batches done as this run's ranks count them: each of fewer ranks has done more.

    Lightning counts those of one rank, and the position in the text is kept for all ranks together.

    Raises:
        UserError: The number of ranks is another, and the run was stopped amid an optimizer step.
    """
    if found.ranks in (None, expected.ranks) or expected.ranks is None or found.accumulation is None:
        return
    for counts in batch_counts(checkpoint):
        done = counts["processed"]
        if done % found.accumulation or counts["ready"] != done:
            raise UserError(
                f"the checkpoint was written amid an optimizer step of {found.ranks} ranks, and the sum of gradients "
                f"so far is not in it. Resume on {found.ranks} ranks, or from a checkpoint between two steps."
            )
        # 0 or 1: the batch whose end the checkpoint was written at is not yet completed.
        open_batches = done - counts["completed"]
        done = done * found.ranks // expected.ranks
        counts.update(ready=done, started=done, processed=done, completed=done - open_batches)


def path_of(name: str, part: str = "logits") -> str:
    """The name of the logits, or another stored ``part``, of the weight ``name`` in a LeapModule's state dict."""
    module, _, tensor = name.rpartition(".")
    return f"model.{module}.parametrizations.{tensor}.0.{part}"


def by_weight(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a LeapModule's state dict holds of gates under the names of a checkpoint: ``<part>.<weight name>``."""
    matches = ((re.fullmatch(r"model\.(.+)\.parametrizations\.(\w+)\.0\.(\w+)", path), x) for path, x in state.items())
    return {f"{match[3]}.{match[1]}.{match[2]}": tensor for match, tensor in matches if match}


def keep_gates_only(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Keep the frozen model out of a LeapModule's state dict, before a strategy gathers it from all ranks."""
    kept = {prefix + path_of(name, part) for name, gate in module.gates.items() for part in gate.stored()}
    for name in [name for name in state if name not in kept]:
        del state[name]


def name_parameters(state: dict[str, Any], names: Sequence[str]) -> None:
    """Let an optimizer's state dict speak of parameters by name where it numbers them as ``names`` are ordered."""

    def name(key: int | str) -> str:
        return names[key] if isinstance(key, int) else key

    if state:
        state["state"] = {name(key): value for key, value in state["state"].items()}
        groups = state["param_groups"]
        state["param_groups"] = [{**group, "params": [name(key) for key in group["params"]]} for group in groups]


def load_checkpoint(path: str | Path, *, mmap: bool = True, check_tensors: bool = True) -> dict[str, Any]:
    """Read the file ``path``, or of a folder all but the tensors, into CPU memory, without running anything in it.

    Every bit of a file is checked.

    Args:
        path: The file.
        mmap: Leave the tensors on the disk until they are used. The file must then stay where it is.
        check_tensors: Check the tensors' bits too; False where only plain values are read, and takes no time then.

    Raises:
        UserError: It is not there, truncated, damaged, or no checkpoint of leap_pl.
    """
    path = Path(path)
    note_input(path)
    if (path / META).is_file():
        path = path / META
    inside = sorted(item.name for item in path.glob("*.ckpt"))
    if inside:
        raise UserError(f"{path} is a folder and no checkpoint. Give a .ckpt in it; there are: {listing(inside, 4)}.")
    if path.suffix == ".safetensors":
        raise UserError(f"{path} is no checkpoint. Give a mask with --mask, or a .ckpt of the run.")
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
    except Exception as error:  # what damage makes the readers raise is no closed list
        raise UserError(f"{path} is truncated, damaged or no checkpoint. Take the checkpoint before it.") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is not a checkpoint of leap_pl fit. Give a .ckpt from a run's checkpoints folder.")
    return checkpoint


def is_checkpoint(path: Path) -> bool:
    """Whether the file ``path`` is a checkpoint of leap_pl, damaged or not, as far as it can be read."""
    try:
        found = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception:  # what it makes the readers raise is no closed list
        return False
    return isinstance(found, dict) and KEY in found


def _damaged_record(path: Path, tensors: bool) -> str | None:
    """What is wrong with the first part of a checkpoint that does not match its checksum, if there is one.

    A checkpoint is a zip archive that stores its parts as they are, each with a CRC-32. torch.load does not
    look at them: it would take a flipped bit for another logit.
    """
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.external_attr & _FOLDER:
                # Of what is marked as a folder torch.load reads nothing, and takes whatever is in the memory.
                return f"{record.filename} is packed or marked as a folder, which torch.save never does"
        if not tensors:
            for record in archive.infolist():
                if not re.search(r"/data/\d+$", record.filename):
                    archive.read(record)  # of the plain values; raises where it does not match its checksum
            return None
        name = archive.testzip()
    return None if name is None else f"{name} does not match its checksum"


def masks_from_checkpoint(path: str | Path) -> MaskSet:
    """The hard mask, at exactly the run's target sparsity, of the logits in the checkpoint ``path``.

    Its provenance tells the step of the checkpoint, ``steps``, which is ``max_steps`` only where learning is finished.

    Of a folder no more than one weight's logits are in memory; they are read several times.

    Raises:
        UserError: The checkpoint cannot be read, or lacks logits.
    """
    checkpoint = load_checkpoint(path)
    identity = read_identity(checkpoint, path)
    tensors, read = checkpoint.get("state_dict", {}), None
    try:
        if Path(path).is_dir():
            from leap_pl.checkpoints.folder import StoredTensors

            folder = StoredTensors(path)
            tensors, read = folder.shapes, folder.read
        steps = checkpoint.get("global_step")
        told = replace(identity, settings={"steps": steps, **identity.settings}) if isinstance(steps, int) else identity
        return MaskSet(_hard_masks(tensors, identity, path, read), provenance(told))
    except UserError:
        raise
    except Exception as error:  # a description that does not describe the logits can be wrong in any way
        raise UserError(
            f"{path} holds logits that do not fit its own description ({' '.join(str(error).split())[:120]}). "
            "Take the checkpoint before it."
        ) from error


def _hard_masks(
    logits: Mapping[str, Tensor], identity: Identity, path: str | Path, read: Callable[[str], Tensor] | None
) -> PackedMasks:
    missing = [name for name in identity.shapes if PREFIX + name not in logits]
    if missing:
        raise UserError(f"{path} lacks the logits of {listing(missing, 3)}. Take the checkpoint before it.")

    def stored_of(name: str, shape: list[int]) -> Stored:
        reader = None if read is None else lambda part: read(f"{part}.{name}")
        beside = _beside(logits, name)
        return Stored(logits[PREFIX + name], tuple(shape), identity.input_dims[name], beside, reader)

    stored = {name: stored_of(name, shape) for name, shape in identity.shapes.items()}
    gates = restore(identity.gate["class_path"], identity.gate["init_args"], stored)
    type(next(iter(gates.values()))).choose(gates, identity.sparsity)
    return PackedMasks.of((name, gate.hard_mask()) for name, gate in gates.items())


def _beside(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What is stored of the weight ``name`` beside its logits."""
    parts = {key.partition(".")[0]: tensor for key, tensor in tensors.items() if key.partition(".")[2] == name}
    parts.pop("logits")
    return parts
