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
    tables = re.findall(r"^(\|.*\| cell \|\n\|[-|]+\n(?:\|.*\|\n)+)", text, re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        columns, _, *rows = ([cell.strip(" *`") for cell in line.split("|")[1:-1]] for line in table.splitlines())
        assert len(rows) >= 4
        for row in rows:
            told = dict(zip(columns, row, strict=True))
            cell = json.loads((RESULTS / "cells" / f"{told['cell']}.json").read_text(encoding="utf-8"))
            values = {Path(path).parts[1]: text["value"] for path, text in cell["perplexity"].items() if "test" in path}
            assert told["Wikipedia (like)"] == f"{values['wikipedia']:.2f}"
            assert told["how-to (unlike)"] == f"{values['howto']:.2f}"
            assert re.sub(r"\D", "", told["sparsity"]) == told["cell"].rpartition("-")[2].replace("dense", "")
            if "mean accuracy of 6 tasks" in told:
                accuracy = f"{cell['mean']['value']:.1%} ± {100 * cell['mean']['stderr']:.1f}"
                assert told["mean accuracy of 6 tasks"] == accuracy
