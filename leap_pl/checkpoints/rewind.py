"""A checkpoint of any moment becomes one of the last optimizer step.

A checkpoint has no room for gradients that are still being accumulated, and Lightning's own goes on after them:
the resumed step would lack them. But until the step is taken, logits, optimizer and schedules are what they were
before its first micro-batch. So the counters and the place in the text are set back to there, and a resumed run
does the whole step again. In a run of 256 micro-batches a step that costs at most one step's time, and a run that
is told to stop need not finish its step first.
"""

from typing import TYPE_CHECKING, Any

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
        del checkpoint["loops"]  # a run that begins


def _rewind_loops(loop: dict[str, Any], steps: int, micro_batches: int) -> None:
    """Set the counters to what Lightning saves in ``on_train_batch_end`` of a step's last micro-batch.

    Those of validation are set to 0, wherever it is.

    Args:
        loop: Of the fit loop, changed in place. A run is a single epoch.
        steps: Optimizer steps that are done, at least one.
        micro_batches: Of this rank in one step.
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
    # Of a validation that is under way nothing is kept: its metrics begin anew, so its batches do.
    validated = loop["epoch_loop.val_loop.batch_progress"]
    for count in (validated["total"], validated["current"]):
        count.update(ready=0, started=0, processed=0, completed=0)
    validated["is_last_batch"] = False
