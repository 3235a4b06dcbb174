"""leap_pl compare: the files that it writes, the page, and what it refuses."""

import csv
import re

import pytest
from made_results import mask_file, result

from leap_pl.cli.compare import compare_command
from leap_pl.comparison import differences
from leap_pl.errors import UserError


def test_writes_table_pictures_and_page(four_results, tmp_path, capsys):
    out = tmp_path / "out"
    found = compare_command(four_results, output_dir=str(out))
    names = {path.name for path in out.iterdir()}
    for stem in ("perplexity-1-held-out", "accuracy", "differences", "density-1-leap-50", "overlap"):
        assert f"{stem}.svg" in names
    assert len(names) == 5 + 4  # pictures; table twice, page, record
    rows = list(csv.DictReader((out / "table.csv").open(encoding="utf-8")))
    assert [row["label"] for row in rows] == ["dense", "leap 50%", "magnitude 50%", "wanda 50%"]
    leap = rows[1]
    assert float(leap["perplexity.held-out.jsonl.value"]) == 14.0
    assert float(leap["perplexity.held-out.jsonl.minus_baseline"]) == pytest.approx(-6.0)
    assert float(leap["accuracy.minus_baseline"]) == pytest.approx(0.25)
    assert rows[0]["perplexity.held-out.jsonl.minus_baseline"] == ""
    assert found["table"][1]["sparsity"] == 0.501
    markdown = (out / "table.md").read_text(encoding="utf-8")
    widths = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    assert "-6.00 ± " in markdown
    assert "(wanda)" in markdown
    assert "windows of 512 tokens, stride 512, 4,096 tokens" in markdown
    assert "not drawn: magnitude 50%, wanda 50%." in markdown
    assert "leap 50%" in capsys.readouterr().out


def test_page_is_whole_in_itself(four_results, tmp_path):
    compare_command(four_results, output_dir=str(tmp_path / "out"))
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    addresses = re.findall(r"(?:src|href|url|@import)\s*[=(]?\s*[\"']([^\"']*)", page)
    assert len(addresses) == len(list((tmp_path / "out").glob("*.svg")))
    assert all(address.startswith("data:image/svg+xml;base64,") for address in addresses)
    assert "<script" not in page
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)


def test_same_inputs_same_files(four_results, tmp_path):
    for place in ("a", "b"):
        compare_command(four_results, output_dir=str(tmp_path / place))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_an_earlier_comparison_is_replaced_only_when_asked(four_results, tmp_path):
    compare_command(four_results, output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="--force"):
        compare_command(four_results[:2], output_dir=str(tmp_path / "out"))
    compare_command(four_results[:2], output_dir=str(tmp_path / "out"), force=True)
    assert not (tmp_path / "out" / "overlap.svg").exists()


def test_masks_and_exported_folders_alone(tmp_path):
    (tmp_path / "exported").mkdir()
    mask_file(tmp_path / "exported" / "mask.safetensors", "leap", 2, density=0.4)
    alone = mask_file(tmp_path / "wanda.safetensors", "wanda", 1)
    compare_command([alone, str(tmp_path / "exported")], output_dir=str(tmp_path / "out"))
    stems = {path.stem for path in (tmp_path / "out").glob("*.svg")}
    assert {"overlap", "density-1-wanda-50", "density-2-leap-59"} <= stems
    assert not any(stem.startswith("perplexity") for stem in stems)


def test_refuses_in_one_line(write_result, tmp_path):
    (tmp_path / "folder").mkdir()
    good = write_result("good", result("leap", 0.5, 14.0))
    lacking = {}
    for path in (("sparsity",), ("perplexity", "held-out.jsonl", "value"), ("tasks", "piqa", "split")):
        content = result("leap", 0.5, 14.0)
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        lacking[f"damaged: '{' > '.join(path)}' is missing or invalid"] = [write_result(path[-1], content)]
    other_path = str(tmp_path / "folder" / ".." / "good.json")
    assert other_path != good
    cases = {
        "Nothing to compare": [],
        "named twice": [good, good],
        "are the same. Name each once": [good, other_path],
        "no such file": [str(tmp_path / "gone.json")],
        r"is a folder without a mask\.safetensors": [str(tmp_path / "folder")],
        "no result of leap_pl evaluate": [write_result("other", {"a": 1})],
        "there is no such checkpoint": [str(tmp_path / "gone.ckpt")],
        **lacking,
    }
    for says, sources in cases.items():
        with pytest.raises(UserError, match=says):
            compare_command(sources, output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_digits_that_are_not_the_accuracy_have_no_paired_error() -> None:
    """Earlier versions cut shares of questions to 0."""
    cut = {"acc": 0.42, "correct": "0000"}
    assert differences._task_stderr(cut, {"acc": 0.44, "correct": "0000"}) is None
    one, other = {"acc": 0.5, "correct": "0101"}, {"acc": 0.75, "correct": "1101"}
    assert differences._task_stderr(one, other) == pytest.approx(0.25)
