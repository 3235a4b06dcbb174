"""Run notebooks from top to bottom and keep what they show, without the times that would differ in every run.

``python notebooks/execute.py notebooks/*.ipynb``, or ``make notebooks``.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path) -> None:
    """Run the notebook ``path`` in its own folder, and replace it once every cell has succeeded."""
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, resources=place, timeout=None, record_timing=False).execute()
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for word in sys.argv[1:]:
        print(f"running {word}", flush=True)
        execute(Path(word))
