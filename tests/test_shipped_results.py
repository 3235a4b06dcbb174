"""The figures in the repository are those of its cells."""

import json
import re
import shutil
from pathlib import Path

from leap_pl.results.report import write_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


def test_the_report_is_that_of_the_cells_and_the_notes(tmp_path: Path) -> None:
    docs = tmp_path / "results"
    docs.mkdir()
    shutil.copy(RESULTS / "notes.md", docs)
    page = write_report(RESULTS / "cells", docs)
    assert page.read_text(encoding="utf-8") == RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    for kind in ("*.png", "*.svg", "configs/*.yaml"):
        shipped, written = ({path.relative_to(folder) for path in folder.glob(kind)} for folder in (RESULTS, docs))
        assert shipped == written != set()


def test_the_readme_tells_figures_of_the_cells() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("| mean accuracy of 6 tasks | cell |\n")[2].partition("\n\n")[0]
    rows = [[cell.strip(" *`") for cell in line.split("|")[1:-1]] for line in table.splitlines()[1:]]
    assert len(rows) == 6
    for _, sparsity, like, unlike, accuracy, name in rows:
        cell = json.loads((RESULTS / "cells" / f"{name}.json").read_text(encoding="utf-8"))
        perplexity = {Path(path).parts[1]: told["value"] for path, told in cell["perplexity"].items() if "test" in path}
        assert [like, unlike] == [f"{perplexity[text]:.2f}" for text in ("wikipedia", "howto")]
        assert accuracy == f"{cell['mean']['value']:.1%} ± {100 * cell['mean']['stderr']:.1f}"
        assert re.sub(r"\D", "", sparsity) == name.rpartition("-")[2].replace("dense", "")
