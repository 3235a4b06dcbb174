"""``leap_pl consolidate``: conversion of a sharded run's checkpoint folder to one file."""

from pathlib import Path

from leap_pl.cli.command import command
from leap_pl.errors import UserError
from leap_pl.escape import say
from leap_pl.files import atomic_file
from leap_pl.inputs.paths import behind_link
from leap_pl.inputs.register import current, note_input, real_path


@command
def consolidate_command(ckpt_path: str, output: str) -> None:
    """Convert a distributed checkpoint to one file, as a single process would have written it.

    Every strategy can resume from the file, on any number of ranks. The conversion needs memory for the logits and the
    optimizer state on one machine. A sharded run can also resume from the folder itself.

    Args:
        ckpt_path: Folder of a distributed checkpoint (step=N.ckpt), as fit writes it with ModelParallelStrategy.
        output: File to write, atomically. It overwrites only checkpoints.
    """
    if Path(output).is_dir():
        raise UserError(f"--output {output} is a folder. Name the file to write, such as {Path(output) / 'one.ckpt'}.")
    if not Path(ckpt_path).is_dir():
        raise UserError(f"--ckpt_path {ckpt_path} is not a folder. Give a distributed checkpoint (step=N.ckpt).")
    _check_place(Path(ckpt_path), Path(output))
    from leap_pl.checkpoints.file import write_archive
    from leap_pl.checkpoints.folder import consolidated

    checkpoint = consolidated(behind_link(ckpt_path))
    with atomic_file(output) as temporary, temporary.open("wb") as file:
        write_archive(checkpoint, file)
    say(f"{output}: step {checkpoint['global_step']} of {ckpt_path}")


def _check_place(folder: Path, file: Path) -> None:
    """Check that writing ``file`` overwrites nothing but a checkpoint, and no part of ``folder``.

    Raises:
        UserError: The file is a part of the folder, or exists and is not a checkpoint.
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
        raise UserError(f"--output {file} exists and is not a checkpoint of leap_pl. Name another file.")
