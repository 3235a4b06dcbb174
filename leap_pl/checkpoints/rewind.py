"""A checkpoint of any moment becomes one of the last optimizer step.

A checkpoint has no room for gradients that are still being accumulated, and Lightning's own goes on after them:
the resumed step would lack them. But until the step is taken, logits, optimizer and schedules are what they were
before its first micro-batch. So the counters and the place in the text are set back to there, and a resumed run
does the whole step again. In a run of 256 micro-batches a step that costs at most one step's time, and a run that
is told to stop need not finish its step first.

The one place that knows by which names Lightning keeps its loops in a checkpoint. Where a version of it has others, a
checkpoint stays as Lightning made it, which it resumes from too, but not bit for bit amid a step.
"""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from leap_pl.errors import UserError, warn_once

if TYPE_CHECKING:
    import lightning as L


def rewind(trainer: "L.Trainer", checkpoint: dict[str, Any]) -> None:
    """Set ``checkpoint`` back to the end of the last optimizer step, where it was made amid the next one.

    Lightning's counters are set to that end in any case: at a few places between two steps they are of no state
    that it resumes from exactly.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(data, "state_before_step"):  # other data, whose place only Lightning knows
        return
    if trainer.global_step:
        try:
            checkpoint["loops"] = _rewound(checkpoint["loops"], trainer)
        except (KeyError, TypeError, AttributeError):
            warn_once(
                "this version of Lightning counts steps in another way: a run that is stopped amid an optimizer step "
                "is resumed without the gradients that the step had come to, and may end with other bits."
            )
            return
    else:
        checkpoint.pop("loops", None)  # a run that begins
    before = data.state_before_step()
    if before is not None:
        checkpoint[type(data).__qualname__] = before


def batch_counts(checkpoint: dict[str, Any]) -> list[dict[str, int]]:
    """Return Lightning's counters of batches in ``checkpoint``, of the run and of its epoch, to be changed in place.

    There are none where nothing is done yet.

    Raises:
        UserError: Lightning keeps them in another way.
    """
    if "loops" not in checkpoint:
        return []
    try:
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        counts = [progress["total"], progress["current"]]
        known = all({"ready", "started", "processed", "completed"} <= count.keys() for count in counts)
    except (KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise UserError(
            "this version of Lightning counts batches in another way than leap_pl knows, and only resumes a run on as "
            "many ranks as it had. Give as many, or install the version of Lightning that the run had."
        )
    return counts


def _rewound(loops: dict[str, Any], trainer: "L.Trainer") -> dict[str, Any]:
    """Return the state of ``loops`` that Lightning saves in ``on_train_batch_end`` of a step's last micro-batch.

    Its counters of validation are 0, wherever that is. A run is a single epoch.

    Raises:
        KeyError: Lightning keeps them by other names.
    """
    loops = deepcopy(loops)
    loop, steps = loops["fit_loop"], trainer.global_step
    done = steps * trainer.accumulate_grad_batches
    batches = loop["epoch_loop.batch_progress"]
    for count in (batches["total"], batches["current"]):
        _set(count, ready=done, started=done, processed=done, completed=done - 1)
    _set(batches, is_last_batch=False)
    zeroed = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["zero_grad"]
    for count in (zeroed["total"], zeroed["current"]):
        _set(count, ready=steps, started=steps, completed=steps)
    _set(loop["epoch_loop.state_dict"], _batches_that_stepped=steps - 1)
    # Of a validation that is under way nothing is kept: its metrics begin anew, so its batches do.
    validated = loop["epoch_loop.val_loop.batch_progress"]
    for count in (validated["total"], validated["current"]):
        _set(count, ready=0, started=0, processed=0, completed=0)
    _set(validated, is_last_batch=False)
    if steps < trainer.max_steps:  # ended early, its only epoch would count as over
        for count in (loop["epoch_progress"]["total"], loop["epoch_progress"]["current"]):
            _set(count, ready=1, started=1, processed=0, completed=0)
    return loops


def _set(counts: dict[str, Any], **values: int) -> None:
    """Set ``counts`` that are there already."""
    unknown = values.keys() - counts.keys()
    if unknown:
        raise KeyError(*unknown)
    counts.update(values)
