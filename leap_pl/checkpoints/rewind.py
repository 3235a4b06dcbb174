"""Rewind a checkpoint made within an optimizer step to the end of the previous step.

A checkpoint does not contain gradients that are still being accumulated, and Lightning's own resumes after their
micro-batches, so the resumed step would lack them. But until the step is taken, logits, optimizer and schedules are in
the state from before its first micro-batch. The counters and the position in the text are therefore rewound to that
point, and a resumed run repeats the whole step. This costs at most the time of one step, and a run with 256
micro-batches a step need not finish its step when a signal stops it.

This is the only module that knows the names of Lightning's loops in a checkpoint. If a version of Lightning uses other
names, the checkpoint is left as Lightning made it: a run resumes from it too, but within a step not bit for bit.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_pl.errors import UserError, warn_once

if TYPE_CHECKING:
    import lightning as L


def rewind(trainer: "L.Trainer", checkpoint: dict[str, Any]) -> None:
    """Rewind ``checkpoint``, in place, to the end of the last optimizer step if it was made within the next one.

    Lightning's counters are set to that end in any case, because at a few points between two steps Lightning does not
    resume from them exactly.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(data, "state_before_step"):  # other data, whose position only Lightning knows
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if progress.current.ready % trainer.accumulate_grad_batches and not progress.is_last_batch:
            warn_once(
                "this checkpoint is of the middle of an optimizer step, and lacks the gradients of its first "
                "micro-batches, since the data module has no state_before_step: a resumed run takes this step without."
            )
        return
    if trainer.global_step:
        try:
            checkpoint["loops"] = _rewound(checkpoint["loops"], trainer)
        except (KeyError, TypeError, AttributeError):
            warn_once(
                "this version of Lightning counts steps differently: a run that is stopped within an optimizer step "
                "resumes without the gradients accumulated so far, and its results may differ."
            )
            return
    else:
        checkpoint.pop("loops", None)  # no step is completed: the run starts from the beginning
    before = data.state_before_step()
    if before is not None:
        checkpoint[type(data).__qualname__] = before


def check_position(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Check that a run can go on from ``checkpoint``: it has a place in its run, and the states of its optimizer.

    Lightning begins a run anew where they are missing, from the mask that was learned.

    Raises:
        UserError: It has not.
    """
    lacks = []
    if checkpoint.get("global_step") and "loops" not in checkpoint:
        lacks.append("place in its run")
    if "state_dict" in checkpoint:  # a sharded run has states of its own
        lacks += [] if checkpoint.get("optimizer_states") else ["states of its optimizer"]
        lacks += [] if "lr_schedulers" in checkpoint else ["state of its schedule"]
    if lacks:
        raise UserError(
            f"{path} holds a mask, and no {' or '.join(lacks)}: it was not written by a run that learns, or not as a "
            "whole. Resume from another checkpoint; leap_pl export takes the mask from this one."
        )


def batch_counts(checkpoint: dict[str, Any]) -> list[dict[str, int]]:
    """Return Lightning's counters of batches in ``checkpoint``, of the run and of its epoch, to be modified in place.

    The list is empty if no step is completed.

    Raises:
        UserError: This version of Lightning stores the counters differently.
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
            "this version of Lightning counts batches differently, so that a run can resume only on as many ranks as "
            "before. Use as many, or install the version of Lightning that wrote the checkpoint."
        )
    return counts


def _rewound(loops: dict[str, Any], trainer: "L.Trainer") -> dict[str, Any]:
    """Return the state of ``loops`` that Lightning saves in ``on_train_batch_end`` of a step's last micro-batch.

    The counters of validation are always 0. A run is a single epoch.

    Raises:
        KeyError: This version of Lightning uses other names.
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
    # An interrupted validation is repeated from its first batch: its metrics are not in the checkpoint.
    validated = loop["epoch_loop.val_loop.batch_progress"]
    for count in (validated["total"], validated["current"]):
        _set(count, ready=0, started=0, processed=0, completed=0)
    _set(validated, is_last_batch=False)
    if steps < trainer.max_steps:  # if the run ended early, Lightning counts its only epoch as completed
        for count in (loop["epoch_progress"]["total"], loop["epoch_progress"]["current"]):
            _set(count, ready=1, started=1, processed=0, completed=0)
    return loops


def _set(counts: dict[str, Any], **values: int) -> None:
    """Set existing ``counts``; raise KeyError for a missing one."""
    unknown = values.keys() - counts.keys()
    if unknown:
        raise KeyError(*unknown)
    counts.update(values)
