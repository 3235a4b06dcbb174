"""``leap_pl consolidate``: the checkpoint folder of a sharded run becomes one file."""

from pathlib import Path

from leap_pl.cli.command import command
from leap_pl.errors import UserError
from leap_pl.escape import say
from leap_pl.files import atomic_file
from leap_pl.inputs.register import current, note_input, real_path


@command
def consolidate_command(ckpt_path: str, output: str) -> None:
    """Make one file of a distributed checkpoint, as a single process would have written it.

    Every strategy resumes from it, on any number of ranks. It takes memory for what is read, logits and the optimizer's
    state, on one machine; a sharded run resumes from the folder itself.

    Args:
        ckpt_path: The folder of a distributed checkpoint (step=N.ckpt), as fit writes it under ModelParallelStrategy.
        output: The file to write. It appears whole or not at all, and replaces nothing but a checkpoint.
    """
    if Path(output).is_dir():
        raise UserError(f"--output {output} is a folder. Name the file to write, as {Path(output) / 'one.ckpt'}.")
    if not Path(ckpt_path).is_dir():
        raise UserError(f"--ckpt_path {ckpt_path} is no folder. Name that of a distributed checkpoint (step=N.ckpt).")
    _check_place(Path(ckpt_path), Path(output))
    import torch

    from leap_pl.checkpoints.folder import consolidated

    checkpoint = consolidated(ckpt_path)
    with atomic_file(output) as temporary:
        torch.save(checkpoint, temporary)
    say(f"{output}: step {checkpoint['global_step']} of {ckpt_path}")


def _check_place(folder: Path, file: Path) -> None:
    """Make sure that ``file`` may be written, and takes away nothing of what is read of ``folder``.

    Raises:
        UserError: It is a part of the folder, or there is a file that is no checkpoint.
    """
    for part in folder.rglob("*"):
        note_input(part)
    if not file.exists():
        return
    register = current()
    assert register is not None
    register.check_file(real_path(file), file)
    from leap_pl.checkpoints.layout import is_checkpoint

    if not is_checkpoint(file):
        raise UserError(f"{file} is there, and is no checkpoint of leap_pl. Name another file.")
