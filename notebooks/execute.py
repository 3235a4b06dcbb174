"""Run notebooks from top to bottom and keep what they show, without the times that would differ in every run.

``python notebooks/execute.py notebooks/*.ipynb``, or ``make notebooks``.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path) -> None:
    """Run the notebook ``path`` in its own folder, and replace it once every cell has succeeded.

    Raises:
        SystemExit: A command of a cell failed, whose exception IPython shows and does not raise.
    """
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, resources=place, timeout=None, record_timing=False).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    if any(output.output_type == "error" for output in outputs):
        raise SystemExit(f"{path}: a command failed, and the notebook was left as it is.")
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for word in sys.argv[1:]:
        print(f"running {word}", flush=True)
        execute(Path(word))
