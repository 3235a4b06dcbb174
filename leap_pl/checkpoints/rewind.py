"""Rewind a checkpoint made within an optimizer step to the end of the previous step.

A checkpoint does not contain gradients that are still being accumulated, and Lightning's own resumes after their
micro-batches, so the resumed step would lack them. But until the step is taken, logits, optimizer and schedules are in
the state from before its first micro-batch. The counters and the position in the text are therefore rewound to that
point, and a resumed run repeats the whole step. This costs at most the time of one step, and a run with 256
micro-batches a step need not finish its step when a signal stops it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning as L


def rewind(trainer: "L.Trainer", checkpoint: dict[str, Any]) -> None:
    """Rewind ``checkpoint``, in place, to the end of the last optimizer step if it was made within the next one.

    Lightning's counters are set to that end in any case, because at a few points between two steps Lightning does not
    resume from them exactly.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(data, "state_before_step"):  # other data, whose position only Lightning knows
        return
    before = data.state_before_step()
    if before is not None:
        checkpoint[type(data).__qualname__] = before
    if trainer.global_step:
        loop = checkpoint["loops"]["fit_loop"]
        _rewind_loops(loop, trainer.global_step, trainer.accumulate_grad_batches)
        if trainer.global_step < trainer.max_steps:  # ended early, its only epoch would count as over
            for count in (loop["epoch_progress"]["total"], loop["epoch_progress"]["current"]):
                count.update(ready=1, started=1, processed=0, completed=0)
    else:
        del checkpoint["loops"]  # the run has not completed a step


def _rewind_loops(loop: dict[str, Any], steps: int, micro_batches: int) -> None:
    """Set the counters to the values that Lightning saves in ``on_train_batch_end`` of a step's last micro-batch.

    The counters of validation are set to 0 in any case.

    Args:
        loop: State of the fit loop, changed in place. A run is a single epoch.
        steps: Completed optimizer steps, at least one.
        micro_batches: Micro-batches per rank in one step.
    """
    done = steps * micro_batches
    batches = loop["epoch_loop.batch_progress"]
    for count in (batches["total"], batches["current"]):
        count.update(ready=done, started=done, processed=done, completed=done - 1)
    batches["is_last_batch"] = False
    zeroed = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["zero_grad"]
    for count in (zeroed["total"], zeroed["current"]):
        count.update(ready=steps, started=steps, completed=steps)
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - 1
    # An interrupted validation is repeated from its first batch: its metrics are not in the checkpoint.
    validated = loop["epoch_loop.val_loop.batch_progress"]
    for count in (validated["total"], validated["current"]):
        count.update(ready=0, started=0, processed=0, completed=0)
    validated["is_last_batch"] = False
