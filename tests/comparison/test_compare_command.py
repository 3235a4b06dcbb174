"""What ``leap_pl compare`` compares is typed as bare words, and what is typed wrong is told in one line."""

import re

import pytest

from leap_pl.cli.main import main
from leap_pl.errors import UserError


@pytest.mark.parametrize(
    "typed",
    [
        "a.json b",
        "--results [a.json,b]",
        "a.json --output_dir {out} b",
        "--output_dir={out} --force a.json b",
        "a.json --force true b",
        "--results a.json b",
        "--results=a.json --baselines wanda b",
        "b --results [a.json]",
        "--config {config} b",
    ],
)
def test_what_is_compared_is_typed_as_bare_words(typed, monkeypatch, tmp_path):
    import leap_pl.comparison.entries

    config = tmp_path / "compare.yaml"
    config.write_text("results: [a.json]\n")
    seen = []

    def read_entries(sources):
        seen.extend(sources)
        raise UserError("enough")

    monkeypatch.setattr(leap_pl.comparison.entries, "read_entries", read_entries)
    with pytest.raises(SystemExit):
        main(["compare", *typed.format(out=tmp_path / "out", config=config).split()])
    assert seen == ["a.json", "b"]


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("", "leap_pl compare: Nothing to compare. .* leap_pl compare dense.json sparse.json"),
        ("--forec a.json b.json", "there is no option --forec. Did you mean --force[?] --help all lists them"),
        ("--output out a.json", "there is no option --output. Did you mean --output_dir[?] --help all lists them"),
        ("a.json --output_dir", "--output_dir"),
        ("gone.json", "gone.json: there is no such file"),
    ],
)
def test_what_is_typed_wrong_is_told_in_one_line(typed, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *typed.split()])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(says, line)
