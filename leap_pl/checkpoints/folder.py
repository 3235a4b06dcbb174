"""Distributed checkpoints: a folder to which each rank of a sharded run writes its part, consolidated into one file.

``leap_pl consolidate`` turns the folder into the file that a single process would have written, from which
``fit --ckpt_path`` resumes on any number of ranks, sharded or not. It needs memory for logits (4 bytes a weight) and
optimizer state (8 bytes with AdamW) on one machine. A sharded run resumes from the folder directly, on any number of
ranks.

The format is that of ``torch.distributed.checkpoint``. Its index is a pickle; no code from it is run, because only the
plain records of such an index are unpickled.
"""

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from io import SEEK_CUR, SEEK_END, SEEK_SET, BytesIO, RawIOBase
from pathlib import Path
from typing import IO, Any, ClassVar
from zipfile import ZipFile

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from leap_pl.checkpoints.identity import read_identity
from leap_pl.checkpoints.layout import by_weight, check_complete, check_readable, load_checkpoint
from leap_pl.errors import UserError, one_line
from leap_pl.escape import terminal

# The unpickler that is written in Python, whose instructions can be checked one by one.
Unpickler: Any = getattr(pickle, "_Unpickler", object)

INDEX = ".metadata"


def consolidated(folder: str | Path) -> dict[str, Any]:
    """Return the checkpoint in ``folder`` as a single process would have written it.

    Args:
        folder: Distributed checkpoint that ``leap_pl fit`` wrote under ``ModelParallelStrategy``.

    Raises:
        UserError: If ``folder`` is not a distributed checkpoint, is damaged, or lacks a part.
    """
    checkpoint = load_checkpoint(folder)
    identity = read_identity(checkpoint, folder)
    parts = _read(folder, _Reader(folder))
    checkpoint["state_dict"] = by_weight(parts.get("state_dict", {}))
    check_complete(identity, checkpoint["state_dict"], folder)
    checkpoint["optimizer_states"] = [parts[key] for key in sorted(parts) if key != "state_dict"]
    return checkpoint


class StoredTensors:
    """Lazy reader of the learned tensors in a folder, which loads one tensor at a time.

    Attributes:
        shapes: ``<part>.<weight name>`` → meta tensor with the shape and dtype of the stored one.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the folder's index.

        Raises:
            UserError: If ``folder`` is not a distributed checkpoint, or its index is damaged.
        """
        self.folder, self.reader = folder, _Reader(folder)
        self.index = self.reader.read_metadata()
        self.shapes: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}
        with _damage_in_one_line(folder):
            places, found = _places(self.index, folder), self.index.state_dict_metadata
            learned = {places[name][1]: name for name in found if places[name][0] == "state_dict"}
            for path, name in learned.items():
                what = found[name]
                if isinstance(what, TensorStorageMetadata):
                    empty = torch.empty(what.size, dtype=what.properties.dtype, device="meta")
                    for key in by_weight({path: empty}):
                        self.shapes[key], self._names[key] = empty, name

    def read(self, key: str) -> Tensor:
        """Return the full tensor ``key`` of :attr:`shapes`, assembled from the shards of all ranks.

        Raises:
            UserError: If a shard is missing or damaged.
        """
        name, empty = self._names[key], self.shapes[key]
        flat = {name: torch.empty(empty.shape, dtype=empty.dtype, device="cpu")}
        _load(flat, self.reader, self.folder)
        return flat[name]


def not_one_file(folder: str | Path) -> UserError:
    """Return the error for a distributed checkpoint that is given to a strategy that reads files."""
    return UserError(
        f"{folder} is a distributed checkpoint, which only ModelParallelStrategy reads, on any number of ranks. For "
        f"another strategy convert it to one file: leap_pl consolidate --ckpt_path {folder} --output one.ckpt"
    )


def state_keys(folder: str | Path) -> set[str]:
    """Return the keys of what optimizers have of a parameter in ``folder``, such as ``exp_avg``.

    Raises:
        UserError: If ``folder`` is not a distributed checkpoint, or its index is damaged.
    """
    with _damage_in_one_line(folder):
        places = _places(_Reader(folder).read_metadata(), folder).values()
        return {str(place[-1]) for place in places if len(place) > 2 and place[1] == "state"}


def _places(index: Any, folder: str | Path) -> dict[str, tuple[Any, ...]]:
    """Return the path of each stored value in the nested contents of ``folder``, by its name in the ``index``.

    Raises:
        UserError: The index has none of one.
    """
    places = index.planner_data
    for name in index.state_dict_metadata:
        place = places.get(name) if isinstance(places, dict) else None
        if not isinstance(place, tuple | list) or not place:
            raise UserError(f"{folder} is damaged (its index has no place of {name}). Take the checkpoint before it.")
    return dict(places)


def check_folder(folder: str | Path) -> None:
    """Check that everything in ``folder`` but tensors is a plain value, before other code unpickles it.

    Of tensors only the places in the files are checked, not the bytes.

    Raises:
        UserError: If it holds anything else, or the folder is incomplete.
    """
    reader = _Reader(folder)
    with _damage_in_one_line(folder):
        places = reader.read_metadata().storage_data.values()
        sizes = {path.name: path.stat().st_size for path in Path(folder).iterdir()}
        for stored in places:
            if stored.offset < 0 or stored.offset + stored.length > sizes.get(stored.relative_path, -1):
                raise ValueError(f"{stored.relative_path} is missing or cut off")
    _read(folder, reader, tensors=False)


def check_folder_of(path: str | Path, strategy: Strategy) -> None:
    """Check a checkpoint, if it is a folder, before ``strategy`` loads it.

    Lightning loads folders by torch's own reader, which runs code that it finds there.

    Raises:
        UserError: The folder holds more than tensors and plain values, is incomplete, or not for this strategy.
    """
    if "://" not in str(path) and Path(path).is_dir():
        if not isinstance(strategy, ModelParallelStrategy):
            raise not_one_file(path)
        check_folder(path)


def check_before_loading(strategy: Any) -> None:
    """Let ``strategy`` check every checkpoint folder that it loads, by :func:`check_folder_of`; once is enough."""
    if "load_checkpoint" not in vars(strategy):
        strategy.load_checkpoint = partial(_load_checked, strategy)


def _load_checked(strategy: Strategy, checkpoint_path: str | Path, *arguments: Any, **settings: Any) -> Any:
    _check_on_ranks(checkpoint_path, strategy)
    return type(strategy).load_checkpoint(strategy, checkpoint_path, *arguments, **settings)


def _check_on_ranks(path: str | Path, strategy: Any) -> None:
    """Check a checkpoint before ``strategy`` loads it: of a folder every stored byte, each rank some of the tensors.

    torch's own reader takes them as they are.

    Raises:
        UserError: On every rank, if one has found damage.
    """
    found: UserError | None = None
    try:
        check_folder_of(path, strategy)
        if "://" not in str(path) and Path(path).is_dir():
            load_checkpoint(path)
            reader = _Reader(path)
            with _damage_in_one_line(path):
                stored = sorted(reader.read_metadata().storage_data.items(), key=lambda item: str(item[0]))
                for _, info in stored[strategy.global_rank :: strategy.world_size]:
                    reader.check_stored(info)
    except UserError as error:
        found = error
    # Before anything is raised: the other ranks wait for what this one has found.
    shards = isinstance(strategy, ModelParallelStrategy)
    if not (strategy.reduce_boolean_decision(found is None, all=True) if shards else found is None):
        raise found or UserError(f"{path} is damaged, as another rank says. Take the checkpoint before it.")


def _read(folder: str | Path, reader: "_Reader", *, tensors: bool = True) -> dict[str, Any]:
    """Return the contents of ``folder``, nested by their paths."""
    with _damage_in_one_line(folder):
        index = reader.read_metadata()
        places = _places(index, folder)
        flat: dict[str, Any] = {}
        for name, what in index.state_dict_metadata.items():
            if not isinstance(what, TensorStorageMetadata):
                flat[name] = None
            elif tensors:
                flat[name] = torch.empty(what.size, dtype=what.properties.dtype, device="meta")
    # Outside: no memory is no damage.
    flat = {name: value if value is None else torch.empty_like(value, device="cpu") for name, value in flat.items()}
    _load(flat, reader, folder)
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        place = nested
        *outer, last = places[name]
        for key in outer:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise UserError(f"{folder} is damaged (values within {name}). Take the checkpoint before it.")
        place[last] = value
    return {name: _lists(part) for name, part in nested.items()}


def _load(flat: dict[str, Any], reader: "_Reader", folder: str | Path) -> None:
    """Fill ``flat`` in place with the values stored under its names."""
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _damage_in_one_line(folder), warnings.catch_warnings():
        for index, info in reader.read_metadata().storage_data.items():
            if index.fqn in flat:
                reader.check_stored(info)
        warnings.filterwarnings("ignore", message=".*the intent is to load in a single process.*")
        load(flat, storage_reader=reader, planner=planner, no_dist=True)


@contextmanager
def _damage_in_one_line(folder: str | Path) -> Iterator[None]:
    """Convert what a damaged index, zip or pickle raises, which can be anything, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (Exception, CheckpointException) as error:
        check_readable(folder, error)
        raise UserError(
            f"{folder} is incomplete or damaged, or holds more than tensors and plain values "
            f"({one_line(error, 160)}). Take the checkpoint before it."
        ) from error


def _lists(value: Any) -> Any:
    """Turn dictionaries with integer keys back into lists."""
    if not isinstance(value, dict):
        return value
    inner = {key: _lists(part) for key, part in value.items()}
    return [inner[key] for key in sorted(inner)] if inner and all(isinstance(key, int) for key in inner) else inner


class _Part(RawIOBase):
    """Part of an open file, read as if it were all of it."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.place = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        self.place = max({SEEK_SET: 0, SEEK_CUR: self.place, SEEK_END: self.length}[whence] + offset, 0)
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.place)
        found = self.file.read(min(len(buffer), max(self.length - self.place, 0)))
        buffer[: len(found)] = found
        self.place += len(found)
        return len(found)


class _Reader(FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        if self._index is None:
            self._index = self._read_index()
        return self._index

    _index: Metadata | None = None

    def check_stored(self, info: Any) -> None:
        """Check the sums of one stored value, a zip of torch's.

        Raises:
            ValueError: A sum is wrong.
        """
        place = Path(self.path) / info.relative_path
        with place.open("rb") as file, ZipFile(_Part(file, info.offset, info.length)) as archive:
            wrong = archive.testzip()  # reads in pieces, however large it is
        if wrong is not None:
            raise ValueError(f"{info.relative_path} has a wrong sum of {wrong}")

    def _read_index(self) -> Metadata:
        index = Path(self.path) / INDEX
        if Unpickler is object:
            raise UserError(f"{index} cannot be read without running code by this version of Python. Use another one.")
        try:
            with index.open("rb") as file:
                metadata = _Records(file).load()
        except FileNotFoundError as error:
            raise UserError(
                f"{self.path} is not a complete checkpoint: it has no {INDEX}. Take the checkpoint before it."
            ) from error
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{index} holds more than an index does ({error}), and leap_pl runs no code from a checkpoint."
            ) from error
        except Exception as error:  # a damaged pickle can raise anything
            check_readable(index, error)
            raise UserError(f"{index} is damaged. Take the checkpoint before it.") from error
        if not isinstance(metadata, Metadata):
            raise UserError(f"{index} is not the index of a checkpoint. Give a folder that leap_pl fit wrote.")
        metadata.storage_meta = None
        self._check_places(metadata)
        return metadata

    def _check_places(self, index: Metadata) -> None:
        """Check that all values are in regular files of the folder itself: torch's reader opens whatever it names.

        Raises:
            UserError: A value is elsewhere, or its file is missing.
        """
        with _damage_in_one_line(Path(self.path)):
            for name in sorted({info.relative_path for info in index.storage_data.values()}):
                if Path(name).name != name:
                    raise ValueError(f"{name} is no name of a file in it")
                if not (Path(self.path) / name).is_file():
                    raise ValueError(f"{name} is missing or cut off")


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


DATA_CLASSES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")


class _Records(Unpickler):
    """Unpickler restricted to the records of an index: data classes, sizes and dtypes.

    An index may set attributes of its own records alone: a pickle can name a class, and change that for the process.
    """

    def find_class(self, module: str, name: str) -> Any:
        if name not in RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)

    def load_build(self) -> None:
        changed = self.stack[-2]
        if not is_dataclass(changed) or isinstance(changed, type) or type(changed).__module__ not in DATA_CLASSES:
            raise pickle.UnpicklingError(f"attributes of {terminal(repr(changed))[:80]}")
        super().load_build()

    dispatch: ClassVar[dict[int, Any]] = {**getattr(Unpickler, "dispatch", {}), pickle.BUILD[0]: load_build}


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: BytesIO) -> None:
        """Load a plain value, such as a number of a parameter group, without running code."""
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)
