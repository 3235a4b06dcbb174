"""Context manager that silences lm-eval."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silence messages about lm-eval's own command line and its copies of data within the context."""
    import datasets
    from lm_eval import evaluator
    from lm_eval.api import task as stock

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    commit, bar = evaluator.get_git_commit_hash, stock.tqdm
    for logger in loggers:
        # What datasets logs about a damaged file is also in the error that it raises.
        logger.setLevel(logging.CRITICAL if logger.name == "datasets" else logging.ERROR)
    datasets.disable_progress_bars()
    # lm-eval asks git for the commit of the working directory, and git prints an error if that is not a repository.
    evaluator.get_git_commit_hash = lambda: None
    # Removes an unnamed progress bar for each task, of which MMLU has 57; those of the forward passes stay.
    stock.tqdm = lambda questions, **_: questions
    try:
        yield
    finally:
        evaluator.get_git_commit_hash, stock.tqdm = commit, bar
        if not bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
