"""Errors of lm-eval's tasks, and of the libraries that read their data, as one line of what to do instead."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from leap_pl.errors import UserError, listing, one_line
from leap_pl.evaluation.local_tasks import PAPER_TASKS, LocalTasks, expected_place, names_below
from leap_pl.inputs.hub import is_network_error
from leap_pl.inputs.plain_values import shown

DATA_PACKAGES = {"datasets", "huggingface_hub"}  # packages that read the data of tasks


def _is_unsafe(error: Exception) -> bool:
    """Return whether lm-eval refuses a task whose score runs what the model has written."""
    return isinstance(error, ValueError) and "marked as unsafe" in str(error)


def _passed(error: Exception) -> tuple[set[str], str | None]:
    """Return the packages that ``error`` has passed through, and the task that lm-eval was busy with, if any."""
    trace, packages, task = error.__traceback__, set(), None
    while trace is not None:
        packages.add(str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0])
        config = getattr(trace.tb_frame.f_locals.get("self"), "config", None)
        task = getattr(config, "task", None) or task
        trace = trace.tb_next
    return packages, task


@contextmanager
def data_reached(remote: list[str], folder: str | Path | None) -> Iterator[None]:
    """Convert errors about the data of the ``remote`` tasks, which ``folder`` does not have, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("Duplicate task"):
            raise UserError(f"--tasks names a task twice, alone or within a group ({error}). Name it once.") from error
        if isinstance(error, ImportError):
            raise UserError(
                f"a task of --tasks needs a package: {error}. Install it, or choose other tasks."
            ) from error
        if _is_unsafe(error):
            raise UserError(
                "a task of --tasks runs code that the model has written, which leap_pl does not. Choose other tasks."
            ) from error
        # datasets raises errors of its own, and others, such as RuntimeError for a data set that is a script.
        packages, task = _passed(error)
        packages.add(type(error).__module__.split(".")[0])
        if not remote or not (is_network_error(error) or packages & DATA_PACKAGES):
            raise
        reason = one_line(error, 200)
        local = "" if folder is None else f", and {folder} has no folder of that name"
        above = (name for name in remote if task == name or task in names_below(name))
        asked = remote[0] if task is None else next(above, remote[0])
        place = expected_place(asked)
        advice = "Choose other tasks"
        if place is not None:
            advice = f"Lay it out as {Path(folder or 'FOLDER') / place} and name the folder with --tasks_folder"
            advice += "; in the repository, make assets-eval does so" if place.parts[0] in PAPER_TASKS else ""
        what = listing(remote) if task is None else asked
        raise UserError(f"the data of {what} could not be fetched from the hub ({reason}){local}. {advice}.") from error


@contextmanager
def questions_fitting(local: LocalTasks, folder: str | Path | None) -> Iterator[None]:
    """Convert errors from local questions that do not fit lm-eval's task definition into a one-line UserError.

    Damaged data can make lm-eval and its readers raise anything, so all errors are converted but those of the model.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        packages, task = _passed(error)
        of_others = task is not None and task not in local.defined
        of_others |= isinstance(error, ImportError) or str(error).startswith("Duplicate task") or _is_unsafe(error)
        if not local.names or "torch" in packages or of_others:
            raise
        cause = error.__cause__ or error  # datasets wraps the actual error
        reason = shown(" ".join(f"{type(cause).__name__}: {cause}".split()), 200)
        raise UserError(
            f"the questions of {listing(sorted(local.names))} in {folder} are damaged, or do not fit the task "
            f"({reason}). Install them again (make assets-eval), or use another folder."
        ) from error


@contextmanager
def answers_fitting(positions: int) -> Iterator[None]:
    """Convert lm-eval's assertions that an answer fits into the model's ``positions`` into a one-line UserError.

    If only the question before the answer is too long, lm-eval truncates it from the left.
    """
    try:
        yield
    except AssertionError as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        # They are recognised by their places in lm_eval/models/huggingface.py; that of answers has no message.
        place = "" if trace is None else trace.tb_frame.f_code.co_name
        if place == "generate_until" and "tokens to generate" in str(error):
            raise UserError(
                f"the model has {positions} positions, and a question of --tasks asks for an answer of as many tokens "
                "or more. Choose other tasks, or a model with more positions."
            ) from error
        if str(error) or place != "_loglikelihood_tokens":
            raise
        raise UserError(
            f"the model has {positions} positions, and a question of --tasks has an answer with more tokens. "
            "Choose other tasks, or a model with more positions."
        ) from error


@contextmanager
def enough_examples(num_fewshot: int | None) -> Iterator[None]:
    """Convert the error of lm-eval that a task has fewer than ``num_fewshot`` solved examples into a UserError."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        trace, sampling = error.__traceback__, False
        while trace is not None:
            sampling |= trace.tb_frame.f_globals.get("__name__") == "lm_eval.api.samplers"
            trace = trace.tb_next
        if not sampling or not num_fewshot:
            raise
        task = _passed(error)[1] or "a task of --tasks"
        raise UserError(
            f"--num_fewshot {num_fewshot}: {task} has fewer solved examples ({one_line(error, 200)}). Give a smaller "
            "number."
        ) from error
