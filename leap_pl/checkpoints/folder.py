"""Distributed checkpoints: a folder in which each rank of a sharded run wrote its own part, made one file again.

``leap_pl consolidate`` makes of it the file that one process would have written, which
``fit --ckpt_path`` takes on any number of ranks, sharded or not. Reading a folder needs memory for what is read,
logits (4 bytes a weight) and the optimizer's state (8 bytes with AdamW), on one machine; a sharded run goes on
from the folder itself, on any number of ranks, without it.

The folder is one of ``torch.distributed.checkpoint``. Its index is a pickle, of which nothing is run here: only
the plain records that such an index is made of are let in.
"""

import pickle
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from leap_pl.checkpoints.identity import read_identity
from leap_pl.checkpoints.layout import by_weight, load_checkpoint, path_of
from leap_pl.errors import UserError, listing

INDEX = ".metadata"


def consolidated(folder: str | Path) -> dict[str, Any]:
    """The checkpoint in ``folder`` as one process would have written it.

    Args:
        folder: As ``leap_pl fit`` wrote it under ``ModelParallelStrategy``.

    Raises:
        UserError: It is no such folder, or damaged, or lacks a part.
    """
    checkpoint = load_checkpoint(folder)
    identity = read_identity(checkpoint, folder)
    parts = _read(folder)
    logits = parts.get("state_dict", {})
    missing = [name for name in identity.shapes if path_of(name) not in logits]
    if missing:
        raise UserError(f"{folder} lacks the logits of {listing(missing, 3)}. Take the checkpoint before it.")
    checkpoint["state_dict"] = by_weight(logits)
    checkpoint["optimizer_states"] = [parts[key] for key in sorted(parts) if key != "state_dict"]
    return checkpoint


class StoredTensors:
    """What is learned in a folder, tensor by tensor: nothing but the one that is asked for is in memory.

    Attributes:
        shapes: ``<part>.<weight name>`` → a tensor on the meta device, of the shape and dtype of the one stored.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the folder's index.

        Raises:
            UserError: It is no such folder, or its index is damaged.
        """
        self.folder, self.reader = folder, _Reader(folder)
        self.index = self.reader.read_metadata()
        places, found = self.index.planner_data, self.index.state_dict_metadata
        learned = {places[name][1]: name for name in found if places[name][0] == "state_dict"}
        self.shapes: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}
        for path, name in learned.items():
            what = found[name]
            if isinstance(what, TensorStorageMetadata):
                empty = torch.empty(what.size, dtype=what.properties.dtype, device="meta")
                for key in by_weight({path: empty}):
                    self.shapes[key], self._names[key] = empty, name

    def read(self, key: str) -> Tensor:
        """The tensor of one of :attr:`shapes`, whole, put together from the parts of all ranks.

        Raises:
            UserError: A part is missing or damaged.
        """
        name, empty = self._names[key], self.shapes[key]
        flat = {name: torch.empty(empty.shape, dtype=empty.dtype)}
        _load(flat, self.reader, self.folder)
        return flat[name]


def check_folder(folder: str | Path) -> None:
    """Make sure that what is not a tensor in ``folder`` is a plain value, before other code unpickles it.

    Raises:
        UserError: It is not, or the folder is incomplete.
    """
    _read(folder, tensors=False)


def _read(folder: str | Path, *, tensors: bool = True) -> dict[str, Any]:
    """What lies in ``folder``, nested as its paths say."""
    reader = _Reader(folder)
    index = reader.read_metadata()
    flat: dict[str, Any] = {}
    for name, what in index.state_dict_metadata.items():
        if not isinstance(what, TensorStorageMetadata):
            flat[name] = None
        elif tensors:
            flat[name] = torch.empty(what.size, dtype=what.properties.dtype)
    _load(flat, reader, folder)
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        place = nested
        *outer, last = index.planner_data[name]
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value
    return {name: _lists(part) for name, part in nested.items()}


def _load(flat: dict[str, Any], reader: "_Reader", folder: str | Path) -> None:
    """Fill ``flat`` with what is stored under its names."""
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*the intent is to load in a single process.*")
            load(flat, storage_reader=reader, planner=planner, no_dist=True)
    except (Exception, CheckpointException) as error:  # of a damaged zip or pickle, whatever it may be
        raise UserError(
            f"{folder} is incomplete or damaged, or holds more than tensors and plain values "
            f"({' '.join(str(error).split())[:160]}). Take the checkpoint before it."
        ) from error


def _lists(value: Any) -> Any:
    """Lists again where a path has numbers."""
    if not isinstance(value, dict):
        return value
    inner = {key: _lists(part) for key, part in value.items()}
    return [inner[key] for key in sorted(inner)] if inner and all(isinstance(key, int) for key in inner) else inner


class _Reader(FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        if self._index is None:
            self._index = self._read_index()
        return self._index

    _index: Metadata | None = None

    def _read_index(self) -> Metadata:
        index = Path(self.path) / INDEX
        try:
            with index.open("rb") as file:
                metadata = _Records(file).load()
        except FileNotFoundError as error:
            raise UserError(
                f"{self.path} is no complete checkpoint: it has no {INDEX}. Take the one before it."
            ) from error
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{index} holds more than an index does ({error}), and leap_pl runs no code from it."
            ) from error
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(f"{index} is damaged. Take the checkpoint before it.") from error
        if not isinstance(metadata, Metadata):
            raise UserError(f"{index} is no index of a checkpoint. Give a folder that leap_pl fit wrote.")
        metadata.storage_meta = None
        return metadata


RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool"},
    "pathlib": {"PosixPath", "Path"},
    "collections": {"OrderedDict"},
}


class _Records(pickle.Unpickler):
    """Reads what an index is made of: some data classes, sizes, types."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: BytesIO) -> None:
        """A plain value, as the numbers of a parameter group are."""
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)
