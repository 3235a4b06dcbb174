"""lm-eval's own tasks on local data: the stock definition with nothing replaced but where the data is.

A folder of tasks holds ``<task>/<split>.jsonl`` (also ``.json`` and ``.parquet``), in the columns that the
data set has on the hub; a group of tasks, such as MMLU, holds ``<group>/<dataset_name>/<split>.jsonl``. For
each task asked for, a definition is written that includes lm-eval's and points it to these files. Prompts,
answers and metrics are lm-eval's, so the score on the same split is the same number as with the hub.

The folder is data. lm-eval's definitions may name Python code (``!function``), so they are taken from the installed
lm-eval alone: definitions and modules that lie in the folder are neither read nor imported.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from leap_pl.errors import UserError, listing
from leap_pl.inputs.register import note_input

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SPLITS = ("train", "validation", "test", "dev")


@dataclass(frozen=True)
class LocalTasks:
    """Task definitions on local data, in a folder that lm-eval can be pointed to.

    Attributes:
        folder: Where the definitions are.
        names: Tasks and groups that are defined there.
    """

    folder: Path
    names: frozenset[str]

    def __contains__(self, task: str) -> bool:
        """Whether ``task`` is read from local data."""
        return task in self.names

    @classmethod
    @contextmanager
    def found_in(cls, folder: str | Path | None, tasks: Sequence[str]) -> Iterator[Self]:
        """Define those of ``tasks`` that ``folder`` holds; None holds none. The definitions are temporary.

        Raises:
            UserError: A folder of that name is there and holds no data of the task.
        """
        if folder is not None:
            note_input(folder)
        with tempfile.TemporaryDirectory() as temporary:
            names: set[str] = set()
            for task in dict.fromkeys(tasks if folder is not None else ()):
                data = _data_folder(Path(str(folder)).resolve(), task)
                if data is not None:
                    _define(task, data, Path(temporary))
                    names.add(task)
            yield cls(Path(temporary), frozenset(names))


def _data_folder(folder: Path, task: str) -> Path | None:
    """Where ``folder`` holds the data of ``task``, alone or within its group (``mmlu_anatomy`` in ``mmlu``)."""
    if (folder / task).is_dir():
        return folder / task
    for group in STOCK:
        # A task called like a group is not always of it: mmlu_redux has questions of its own.
        if task.startswith(f"{group}_") and (folder / group).is_dir() and task in _stock_index(group):
            return folder / group
    return None


def _define(task: str, data: Path, into: Path) -> None:
    # The folder's own name first: that of a group says where its tasks are.
    index = _stock_index(data.name) if data.name in STOCK else {}
    if task not in index:
        index = _stock_index(task)
    if task not in index:
        raise UserError(
            f"lm-eval has no task {task}, though {data} is there. Rename the folder, or ask for another task."
        )
    for entry in _below(task, index):
        if entry.yaml_path is None:
            continue
        definition: dict[str, Any] = {"include": str(entry.yaml_path)}
        if "group" not in entry.cfg:
            # Of a group every task has a folder of its own, named as the hub names its part of the data set.
            alone = entry.name == data.name
            definition |= _data_keys(data if alone else data / str(entry.cfg.get("dataset_name")), entry.cfg)
            if entry.name == task:
                # A tag would claim to be all of its tasks, and here is only one of them.
                definition["tag"] = None
        # JSON is YAML.
        (into / f"{entry.name}.yaml").write_text(json.dumps(definition), encoding="utf-8")


def _below(name: str, index: dict[str, Any]) -> Iterator[Any]:
    """The definition of ``name`` and, where it is a group or a tag, of all under it."""
    entry = index[name]
    yield entry
    children = (entry.cfg or {}).get("task") if "group" in (entry.cfg or {}) else None
    if entry.yaml_path is None:
        children = sorted(entry.tags)
    for child in children or ():
        yield from _below(child, index)


def _data_keys(data: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What a definition says of its data, with what ``data`` holds in place of the hub's."""
    files = {split: file for split in SPLITS for suffix in READERS if (file := data / f"{split}{suffix}").is_file()}
    if not files:
        there = sorted(p.name for p in data.iterdir()) if data.is_dir() else []
        raise UserError(
            f"{data} holds no split of the task (found: {listing(there, 6)}). It is to hold files such as "
            "validation.jsonl or test.jsonl; make assets-eval lays out those of the paper's tasks."
        )
    wanted = ("training_split", "validation_split", "test_split", "fewshot_split")
    splits = {key: config[key] if config[key] in files else None for key in wanted if key in config}
    if not (splits.get("validation_split") or splits.get("test_split")):
        raise UserError(f"{data} holds {listing(sorted(files))}, and the task is scored on another split.")
    suffix = next(iter(files.values())).suffix
    return splits | {
        "dataset_path": READERS[suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
    }


# Where lm-eval keeps the tasks most asked for: its whole index takes ten seconds to build.
STOCK = {
    "arc_challenge": "arc",
    "arc_easy": "arc",
    "boolq": "super_glue/boolq",
    "hellaswag": "hellaswag",
    "mmlu": "mmlu/default",
    "openbookqa": "openbookqa",
    "piqa": "piqa",
    "sciq": "sciq",
    "winogrande": "winogrande",
}


def _stock_index(task: str) -> dict[str, Any]:
    """lm-eval's definitions by name, at least those that ``task`` needs."""
    import lm_eval.tasks

    place = Path(lm_eval.tasks.__file__).parent / STOCK.get(task, "nowhere")
    index: dict[str, Any] = {}
    if place.is_dir():
        index = lm_eval.tasks.TaskManager(include_path=str(place), include_defaults=False).task_index
    return index if task in index else lm_eval.tasks.TaskManager().task_index
