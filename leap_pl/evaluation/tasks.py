"""Zero-shot tasks by lm-eval's Python API, on the model in memory."""

import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_pl.base_model.backbone import evaluating
from leap_pl.base_model.prefix import Bos, prefix_of, record_of
from leap_pl.errors import UserError, listing, warn_once
from leap_pl.evaluation.local_tasks import PAPER_TASKS, STOCK, LocalTasks
from leap_pl.evaluation.task_errors import answers_fitting, data_reached, enough_examples, questions_fitting
from leap_pl.inputs.hub import offline_if_unreachable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBED = "allenai/ai2_arc"  # data set that the hub is asked for, to know whether it answers


def check_tasks(tasks: Sequence[str], tasks_folder: str | Path | None = None, num_fewshot: int | None = None) -> None:
    """Check that ``tasks`` exist, before a model is loaded.

    Args:
        tasks: Names of lm-eval tasks.
        tasks_folder: Folder of local data, as in :func:`evaluate_tasks`.
        num_fewshot: Solved examples before each question, likewise.

    Raises:
        UserError: If a task does not exist, or its local folder lacks data.
    """
    with LocalTasks.found_in(tasks_folder, tasks, num_fewshot) as local:
        others = [task for task in tasks if task not in local and task not in STOCK]
        unknown = [task for task in others if task not in _known_names()]
    if unknown:
        raise UserError(_unknown(unknown, _known_names()))


@cache
def _known_names() -> list[str]:
    """Return the names of all tasks, groups and tags of lm-eval, which reads fourteen thousand files for them."""
    from lm_eval.tasks import TaskManager

    return list(TaskManager().all_tasks)


def evaluate_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    tasks_folder: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    bos: Bos = "every",
) -> dict[str, dict[str, Any]]:
    """Score ``model`` on ``tasks``.

    Args:
        model: A causal language model, on its device.
        tokenizer: Tokenizer of the model.
        tasks: Names of lm-eval tasks.
        tasks_folder: Folder of local data; the tasks in it are read from there, with lm-eval's own prompts.
        limit: Number of questions of each task (of each subject of a group), from the first; None for all.
        num_fewshot: Solved examples before each question; by default the task's own number, mostly 0.
        batch_size: Windows of 512 tokens that a forward pass may take: of answers as many as fit, those of a question
            with their common beginning once. Where the model cannot share it, requests in a forward pass.
        seed: Seed of few-shot sampling.
        bos: Whether requests begin with what the tokenizer puts before a text: each is a text of one window, so all do
            but with ``none``. Windows of a text whose likelihood is a task begin as lm-eval begins them.

    Returns:
        Task → its metrics (``acc``, ``acc_stderr``, ``acc_norm`` …), ``samples``, ``split``, ``num_fewshot``,
        ``version``, ``source`` (``local`` or ``hub``), ``limit``, ``bos`` (``every`` or ``none``; only if the tokenizer
        puts something before a text), and ``correct``: one digit per question, in order, 1 if ``acc`` counts the answer
        as correct, so that two results can be compared question by question; ``questions_digest`` says of which.

    Raises:
        UserError: If a task does not exist, its data is neither local nor reachable, local data does not fit the task,
            or an answer has more tokens than the model has positions, no token, or one without an embedding.
    """
    with LocalTasks.found_in(tasks_folder, tasks, num_fewshot) as local:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from leap_pl.evaluation.harness import PrefixSharingLM

        remote = [task for task in tasks if task not in local]
        # Indexing lm-eval's own tasks reads fourteen thousand files: skip it if all tasks are local.
        manager = TaskManager(include_path=str(local.folder), include_defaults=bool(remote))
        lost = sorted(local.names - set(manager.all_tasks))
        if lost:  # lm-eval leaves out definitions that it cannot read
            raise UserError(f"lm-eval cannot read {listing(lost)} in {tasks_folder}. Give the folder another name.")
        unknown = [task for task in remote if task not in manager.all_tasks]
        if unknown:
            raise UserError(_unknown(unknown, manager.all_tasks))
        begun: Bos = "none" if bos == "none" else "every"
        # lm-eval's own default depends on its version and on the family of the model.
        prefix = prefix_of(tokenizer) if begun == "every" else ()
        reach = offline_if_unreachable(PROBED, "dataset") if remote else nullcontext()
        with ExitStack() as stack:
            for context in (evaluating(model), _keeping_random_state(), data_reached(remote, tasks_folder), reach):
                stack.enter_context(context)
            lm = PrefixSharingLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, prefix=prefix)
            stack.enter_context(questions_fitting(local, tasks_folder))
            stack.enter_context(answers_fitting(lm.max_length))
            stack.enter_context(enough_examples(num_fewshot))
            found = simple_evaluate(
                model=lm,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                bootstrap_iters=1000,
            )
    assert found is not None
    shots = found.get("n-shot", {})
    if own := sorted(task for task, n in shots.items() if num_fewshot is not None and n == 0 != num_fewshot):
        warn_once(f"--num_fewshot {num_fewshot}: {listing(own)} is always asked without examples.")
    # lm-eval says which tasks a group has, and not which a tag has.
    tags = {tag: tagged for tag in tasks if (tagged := _tagged(tag, manager))}
    found["group_subtasks"] = found.get("group_subtasks", {}) | tags
    shared = {"limit": limit, **record_of(begun, tokenizer)}
    return {task: _scores(task, found) | {"source": "local" if task in local else "hub", **shared} for task in tasks}


def mean_accuracy(scores: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Return the mean of ``acc`` over the tasks that have one, each with the same weight, as in the paper.

    Returns:
        ``value``, ``stderr``, ``tasks``, and ``paper``: whether these are the paper's six tasks, without a limit. None
        if no task has an accuracy.
    """
    counted = {task: score for task, score in scores.items() if "acc" in score}
    if not counted:
        return None
    errors = [score.get("acc_stderr") for score in counted.values()]
    known = [error for error in errors if error is not None]
    return {
        "value": sum(score["acc"] for score in counted.values()) / len(counted),
        # Tasks are independent samples of questions.
        "stderr": math.sqrt(sum(e * e for e in known)) / len(counted) if len(known) == len(errors) else None,
        "tasks": sorted(counted),
        "paper": sorted(counted) == sorted(PAPER_TASKS) and all(score["limit"] is None for score in counted.values()),
    }


def _scores(task: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return lm-eval's result for a task, a group or a tag, under this project's names."""
    table = {**found["results"], **found.get("groups", {})}
    leaves = _leaves(task, found.get("group_subtasks", {}))
    row = table.get(task, {})
    if not any("," in key for key in row):  # a tag, or a group whose definition says nothing of a mean
        row = _pooled([table[leaf] for leaf in leaves], [_samples(leaf, found) for leaf in leaves])
        if not row:  # no metric that all of them have, as in glue: each has its own
            row = {f"{leaf}_{key}": value for leaf in leaves for key, value in table[leaf].items() if "," in key}
            warn_once(f"--tasks {task}: its tasks have no accuracy in common, so each is shown, and no mean.")
    scores: dict[str, Any] = {}
    for key, value in row.items():
        name, _, which = key.partition(",")
        # A filter other than none is another way to extract the answer, and becomes part of the metric's name.
        name = name if which in ("", "none") else f"{name}_{which}"
        if isinstance(value, int | float) and which:
            scores[name] = float(value)
    first = found["configs"][leaves[0]]
    return scores | {
        "samples": sum(_samples(leaf, found) for leaf in leaves),
        "split": first.get("test_split") or first.get("validation_split"),
        "num_fewshot": found["n-shot"].get(leaves[0]),
        "version": found["versions"].get(task, found["versions"].get(leaves[0])),
        "correct": "".join(_correct(found["samples"].get(leaf, [])) for leaf in leaves),
        "questions_digest": _digest(
            [sample for leaf in leaves for sample in _in_order(found["samples"].get(leaf, []))]
        ),
    }


def _tagged(name: str, manager: Any) -> list[str]:
    """Return the tasks of a tag; none of a task or a group."""
    entry = manager.task_index.get(name) if name in manager.all_tags else None
    return sorted(getattr(entry, "tags", None) or ())


def _samples(leaf: str, found: dict[str, Any]) -> int:
    return int(found["n-samples"][leaf]["effective"])


def _leaves(name: str, children: dict[str, list[str]]) -> list[str]:
    """Return the tasks under a group, in a fixed order; the task itself if it is not a group."""
    below = children.get(name)
    return [leaf for child in sorted(below) for leaf in _leaves(child, children)] if below else [name]


def _pooled(rows: list[dict[str, Any]], counts: list[int]) -> dict[str, Any]:
    """Return the mean over all questions of a tag's tasks, which lm-eval does not aggregate."""
    pooled: dict[str, Any] = {}
    for key in ("acc", "acc_norm"):
        if all(f"{key},none" in row for row in rows):
            total = sum(counts)
            pooled[f"{key},none"] = sum(row[f"{key},none"] * n for row, n in zip(rows, counts, strict=True)) / total
            errors = [error for row in rows if isinstance(error := row.get(f"{key}_stderr,none"), float)]
            if len(errors) == len(rows):
                squares = sum((error * n) ** 2 for error, n in zip(errors, counts, strict=True))
                pooled[f"{key}_stderr,none"] = math.sqrt(squares) / total
    return pooled


def _correct(samples: list[dict[str, Any]]) -> str:
    """Return a digit for each question; an empty string if ``acc`` is a share of each, as TruthfulQA's mc2 is."""
    scored = [sample["acc"] for sample in _in_order(samples) if isinstance(sample.get("acc"), int | float)]
    return "".join(str(int(right)) for right in scored) if {*scored} <= {0, 1} else ""


def _in_order(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda sample: int(sample["doc_id"]))


def _digest(samples: list[dict[str, Any]]) -> str:
    """Return a digest of the questions as they are asked, solved examples included, of all answers and the right."""
    asked = [[sample.get("arguments"), sample.get("target")] for sample in samples]
    return hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()[:16]


def _unknown(names: list[str], known: Sequence[str]) -> str:
    from difflib import get_close_matches

    near = [match for name in names for match in get_close_matches(name, known, 3)]
    hint = f" Similar names: {', '.join(near)}." if near else ""
    return f"lm-eval has no task {listing(names)}.{hint} To list all tasks: lm_eval ls tasks"


@contextmanager
def _keeping_random_state() -> Iterator[None]:
    """Restore the states of the random generators of Python, NumPy and torch on exit: lm-eval seeds them."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    # Where the driver is too old for this torch, devices are counted all the same, and cannot be used.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng([*devices]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
