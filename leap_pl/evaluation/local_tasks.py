"""lm-eval's own tasks on local data: the stock definitions, with only the data source replaced.

A folder of tasks has files ``<task>/<split>.jsonl`` (or ``.json``, ``.parquet``) with the columns of the hub's dataset;
a group of tasks, such as MMLU, has files ``<group>/<dataset_name>/<split>.jsonl``. For each requested task, a
definition is written that includes lm-eval's and points it to these files. Prompts, answers and metrics are lm-eval's,
so the score on the same split equals the score with data from the hub.

The folder is treated as data. lm-eval's definitions may name Python code (``!function``), so they are read from the
installed lm-eval only: definitions and modules in the folder are neither read nor imported.
"""

import glob
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from leap_pl.errors import UserError, listing
from leap_pl.inputs.register import note_input

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
PAPER_TASKS = ("mmlu", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa")
SPLITS = ("train", "validation", "test", "dev")


@dataclass(frozen=True)
class LocalTasks:
    """Folder of task definitions on local data, for lm-eval's ``include_path``.

    Attributes:
        folder: Folder of the definitions.
        names: Tasks and groups that were asked for and are defined there.
        defined: All tasks and groups that are defined there, those below a group too.
    """

    folder: Path
    names: frozenset[str]
    defined: frozenset[str] = frozenset()

    def __contains__(self, task: str) -> bool:
        """Return whether ``task`` is read from local data."""
        return task in self.names

    @classmethod
    @contextmanager
    def found_in(
        cls, folder: str | Path | None, tasks: Sequence[str], num_fewshot: int | None = None
    ) -> Iterator[Self]:
        """Write temporary definitions of those ``tasks`` that have data in ``folder``; of none if it is None.

        Args:
            folder: Folder of the data.
            tasks: Names of the tasks.
            num_fewshot: Number of solved examples that will be asked for; None is the task's own.

        Raises:
            UserError: If a folder named like a task has no data of it, or none to take the solved examples from.
        """
        if folder is not None:
            note_input(folder)
        # datasets keeps questions open; where open files cannot be removed, the system does so later.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            names: set[str] = set()
            for task in dict.fromkeys(tasks if folder is not None else ()):
                data = _data_folder(Path(str(folder)).resolve(), task)
                if data is not None:
                    _define(task, data, Path(temporary), num_fewshot)
                    names.add(task)
            defined = frozenset(file.stem for file in Path(temporary).glob("*.yaml"))
            yield cls(Path(temporary), frozenset(names), defined)


def _data_folder(folder: Path, task: str) -> Path | None:
    """Return the subfolder with the data of ``task``, its own or its group's (``mmlu`` for ``mmlu_anatomy``)."""
    if (folder / task).is_dir():
        return folder / task
    for group in STOCK:
        # A name that starts like a group's is not enough: mmlu_redux has its own questions.
        if task.startswith(f"{group}_") and (folder / group).is_dir() and task in _stock_index(group):
            return folder / group
    return None


def _define(task: str, data: Path, into: Path, num_fewshot: int | None) -> None:
    # Look up the folder's name first: for a group it leads to the definitions of its tasks.
    index = _stock_index(data.name) if data.name in STOCK else {}
    if task not in index:
        index = _stock_index(task)
    if task not in index:
        raise UserError(f"lm-eval has no task {task}, though {data} exists. Rename the folder, or choose another task.")
    for entry in _below(task, index):
        if entry.yaml_path is None:
            continue
        definition: dict[str, Any] = {"include": str(entry.yaml_path)}
        if "group" not in entry.cfg:
            # Each task of a group has its own folder, named like its dataset configuration on the hub.
            alone = entry.name == data.name
            place = data if alone else data / str(entry.cfg.get("dataset_name"))
            definition |= _data_keys(place, into / "cache", entry.cfg, num_fewshot)
            if entry.name == task:
                # A tag stands for all of its tasks, and only one of them is defined here.
                definition["tag"] = None
        (into / f"{entry.name}.yaml").write_text(_yaml(definition), encoding="ascii")


def _yaml(definition: dict[str, Any]) -> str:
    """Return a definition as JSON that is YAML: characters beyond U+FFFF, as of a path, are escaped as YAML does."""
    text = json.dumps(definition, ensure_ascii=False)
    return "".join(char if char.isascii() else _escape(ord(char)) for char in text)


def _escape(code: int) -> str:
    return f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}"


def _below(name: str, index: dict[str, Any]) -> Iterator[Any]:
    """Yield the definition of ``name`` and, if it is a group or a tag, of all tasks and groups under it."""
    entry = index[name]
    yield entry
    children = (entry.cfg or {}).get("task") if "group" in (entry.cfg or {}) else None
    if entry.yaml_path is None:
        children = sorted(entry.tags)
    for name in _names_in(children):
        if name in index:
            yield from _below(name, index)


def _names_in(children: Any) -> Iterator[str]:
    """Yield the names in the list of a group, of which some are within groups that are defined there."""
    for child in [children] if isinstance(children, str | dict) else children or ():
        yield from _names_in(child.get("task")) if isinstance(child, dict) else (str(child),)


def names_below(task: str) -> set[str]:
    """Return the names of ``task`` and, if it is a group or a tag, of all tasks under it."""
    index = _stock_index(task)
    return {entry.name for entry in _below(task, index)} if task in index else {task}


def expected_place(task: str) -> Path | None:
    """Return the file, in a folder of tasks, from which ``task`` would be scored: of a group, that of its first task.

    None if lm-eval scores it on a split that a folder cannot have.
    """
    index = _stock_index(task)
    for entry in _below(task, index) if task in index else ():
        config = entry.cfg or {}
        split = config.get("test_split") or config.get("validation_split")
        if split in SPLITS and (entry.name == task or config.get("dataset_name")):
            return Path(task, "" if entry.name == task else str(config["dataset_name"]), f"{split}.jsonl")
    return None


def _data_keys(data: Path, cache: Path, config: dict[str, Any], examples: int | None) -> dict[str, Any]:
    """Return the data entries of a task definition, pointing to the files in ``data`` instead of the hub.

    ``cache`` is where datasets may keep what it has read. Its usual place serves files of the same name and time of
    change, whatever they hold.

    Raises:
        UserError: ``data`` has not the questions, or not the text of the solved ``examples`` before each; or it has
            files of different formats.
    """
    found = [file for split in SPLITS for suffix in READERS if (file := data / f"{split}{suffix}").is_file()]
    files = {file.stem: file for file in found}
    if not files:
        present = sorted(p.name for p in data.iterdir()) if data.is_dir() else []
        raise UserError(
            f"{data} holds no split of the task (found: {listing(present, 6)}). Add files such as validation.jsonl or "
            "test.jsonl; make assets-eval writes those of the paper's tasks."
        )
    suffix = next(iter(files.values())).suffix
    # One reader reads all splits of a task.
    if len(found) > len(files) or len({READERS[file.suffix] for file in found}) > 1:
        held = listing([file.name for file in found])
        raise UserError(f"{data} holds {held}. Keep one file for each split, all in one format.")
    wanted = ("training_split", "validation_split", "test_split", "fewshot_split")
    splits = {key: config[key] if config[key] in files else None for key in wanted if key in config}
    # lm-eval takes solved examples from the first of these that there is: of others they might be the questions.
    source = next(
        (config[key] for key in ("fewshot_split", "training_split", "validation_split") if config.get(key)), None
    )
    examples = config.get("num_fewshot") if examples is None else examples
    if examples and source is not None and source not in files:
        raise UserError(
            f"{data} has no split {source}, from which the {examples} solved examples before each question are taken. "
            f"Add a file such as {source}{suffix}, or set --num_fewshot 0."
        )
    if not (splits.get("validation_split") or splits.get("test_split")):
        raise UserError(f"{data} holds {listing(sorted(files))}, and the task is scored on another split.")
    return splits | {
        "dataset_path": READERS[suffix],
        "dataset_name": None,
        "dataset_kwargs": {
            # Which datasets takes for patterns: a folder with brackets in its name would be another's.
            "data_files": {split: glob.escape(str(file)) for split, file in files.items()},
            "cache_dir": str(cache),
        },
    }


# Folders of common tasks in lm-eval: building its whole index takes ten seconds.
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
    """Return lm-eval's definitions by name, at least those that ``task`` needs."""
    import lm_eval.tasks

    place = Path(lm_eval.tasks.__file__).parent / STOCK.get(task, "nowhere")
    index: dict[str, Any] = {}
    if place.is_dir():
        index = lm_eval.tasks.TaskManager(include_path=str(place), include_defaults=False).task_index
    return index if task in index else _whole_index()


@cache
def _whole_index() -> dict[str, Any]:
    """Return the definitions of all tasks, for which fourteen thousand files are read."""
    from lm_eval.tasks import TaskManager

    index: dict[str, Any] = TaskManager().task_index
    return index
