"""What lies in a folder, to compare before and after."""

from pathlib import Path


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything under ``folder``: links with where they lead, files with their bytes."""
    return {
        path.relative_to(folder).as_posix(): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }
