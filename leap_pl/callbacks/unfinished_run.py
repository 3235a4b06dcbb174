"""What is said of a run that ended before its last step, and requeuing its SLURM job."""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from leap_pl.escape import say
from leap_pl.inputs.register import current, running_verb

SWITCHED_OFF = ", since checkpoint.save_top_k and checkpoint.save_last switch them off"


@dataclass(frozen=True)
class UnfinishedRun:
    """A run that ended before its last step, and where it can be resumed.

    Attributes:
        step: Optimizer steps done.
        max_steps: Optimizer steps of the whole run.
        saved_step: Step of the newest checkpoint that this run has written; 0: it has written none.
        saved_path: Path of that checkpoint.
        folder: Folder of the checkpoints.
        is_named: Whether that folder was set; each run chooses another otherwise.
        is_off: Whether the settings let no checkpoint be written.
        began_with: Checkpoint that the run resumed from.
    """

    step: int
    max_steps: int
    saved_step: int
    saved_path: str
    folder: Path
    is_named: bool
    is_off: bool
    began_with: str | None

    @property
    def resuming(self) -> str:
        """Return the options, or in a program the call, that resume the run from its newest checkpoint."""
        if current() is None:
            return _call(self.saved_path)
        return "--ckpt_path last" + ("" if self.is_named else f" --checkpoint.dirpath {shlex.quote(str(self.folder))}")

    def report_end(self) -> None:
        """Print that learning is not finished: Lightning has ended the run, by ``trainer.max_time`` or a callback."""
        found = f"There is no checkpoint{SWITCHED_OFF * self.is_off}"
        remedy = "Start it again with more time"
        if self.saved_step:
            found = f"The checkpoint of step {self.saved_step} is in {self.folder}"
            remedy = f"Resume with {self.resuming}"
        elif self.began_with is not None:
            found = f"It began with the checkpoint {self.began_with}"
            remedy = f"Resume with --ckpt_path {shlex.quote(self.began_with)}"
            if current() is None:
                remedy = f"Resume with {_call(self.began_with)}"
        _say(
            f"ended at step {self.step} of {self.max_steps}; learning is not finished, and no mask is written. "
            f"{found}. {remedy}."
        )

    def report_stop(self, signal: str, *, learning: bool) -> None:
        """Print that ``signal`` has stopped the run, ``learning`` or before that."""
        if self.saved_step:
            message = (
                f"stopped at step {self.step} of {self.max_steps}; the checkpoint of step {self.saved_step} is in "
                f"{self.folder}. Resume with {self.resuming}."
            )
        elif self.began_with is not None and not learning:
            message = f"stopped before its first step; it begins with the checkpoint {self.began_with}."
        elif self.step:
            message = f"stopped at step {self.step}; no checkpoint is written{SWITCHED_OFF * self.is_off}."
        else:
            message = "stopped before the first step was done; no checkpoint is written."
        say("", sys.stderr)  # a progress bar may be on this line
        _say(f"{signal}: {message}")

    @property
    def can_go_on(self) -> bool:
        """Return whether the same command loses no step: it resumes, or there is nothing to resume yet."""
        return bool(self.saved_step or not self.step or self.began_with is not None)


def _call(checkpoint: str) -> str:
    return f"trainer.fit(..., ckpt_path={checkpoint!r}) and a new trainer"


def requeue() -> None:
    """Requeue this SLURM job, which then resumes from its newest checkpoint."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
        _say(f"job {job} was requeued.")
    except (OSError, subprocess.CalledProcessError) as error:
        _say(f"job {job} could not be requeued ({error}).")


def refuse_requeue() -> None:
    """Print that the SLURM job is not requeued: it would not find its checkpoint."""
    _say("the job is not requeued. Set --checkpoint.dirpath for that.")


def _say(message: str) -> None:
    say(f"leap_pl {running_verb()}: {message}", sys.stderr)
