"""The table: what shares a column, what is a row's name, the differences and their errors, the verdict."""

import copy
import csv
import math
import random
import re
import statistics
from dataclasses import replace

import pytest
from made_results import result

from leap_pl.cli.compare import compare_command
from leap_pl.comparison.differences import (
    _rivals,
    accuracy_difference,
    perplexity_difference,
    perplexity_difference_to,
)
from leap_pl.comparison.entries import Entry, read_entries
from leap_pl.comparison.table import make_table
from leap_pl.comparison.verdict import verdict
from leap_pl.errors import UserError

BASELINES = ("magnitude", "wanda")


def test_patterns_are_told_apart_and_compared_with_their_own(write_result, tmp_path):
    """2:4 masks have a name and a line of their own, and an n:m mask's rival is one of its pattern."""
    sources = []
    for method, pattern, value in (("wanda", None, 20.0), ("wanda", "2:4", 40.0), ("maskllm", "2:4", 30.0)):
        content = result(method, 0.5, value)
        if pattern is not None:
            content["config"] = {"pattern": pattern}
        sources.append(write_result(f"{method}-{pattern}".replace(":", ""), content))
    entries = {entry.label: entry for entry in read_entries(sources)}
    assert set(entries) == {"wanda 50%", "wanda 2:4 50%", "maskllm 2:4 50%"}
    learned = entries["maskllm 2:4 50%"]
    assert [rival.label for rival in _rivals(learned, list(entries.values()), BASELINES)] == ["wanda 2:4 50%"]


def test_rows_are_ordered_by_sparsity_pattern_and_method(write_result):
    """A sparsity that is off by some weights is no other one."""
    paths = []
    for method, pattern, sparsity in (
        ("wanda", "unstructured", 0.49999),
        ("admm", "2:4", 0.5),
        ("admm", "unstructured", 0.5),
        ("admm", "unstructured", 0.6),
    ):
        content = result(method, sparsity, 20.0)
        content["config"] = {"pattern": pattern}
        paths.append(write_result(f"r{len(paths)}", content))
    labels = [entry.label for entry in read_entries(paths)]
    assert labels == ["admm 50%", "wanda 50%", "admm 2:4 50%", "admm 60%"]


def test_data_types_that_differ_are_told(write_result):
    def notes(*dtypes):
        paths = []
        for number, dtype in enumerate(dtypes):
            content = result("leap", 0.5 + number / 10, 14.0)
            content["model"] |= {} if dtype is None else {"dtype": dtype}
            paths.append(write_result(f"r{number}", content))
        return "\n".join(make_table(read_entries(paths), BASELINES).notes)

    assert "data type" not in notes("float32", "float32", None)  # earlier versions recorded none
    assert "may be rounding: in bfloat16 leap 60%; in float32 leap 50%, leap 70%." in notes(
        "float32", "bfloat16", "float32"
    )


def test_labels_are_unique(write_result):
    paths = [write_result(name, result("leap", 0.5, 14.0)) for name in ("one", "two")]
    assert [entry.label for entry in read_entries(paths)] == ["leap 50% (one)", "leap 50% (two)"]


@pytest.mark.parametrize(
    ("models", "named"),
    [
        ([("org/base", "f00d"), ("../assets/org/base", "f00d")], ["base", "base"]),
        ([("org/base", "f00d"), ("org/other", "beef")], ["base", "other"]),
        (
            [("org/base", "f00d"), ("fork/base", "beef"), ("/x/fork/base", "beef")],
            ["org/base", "fork/base", "fork/base"],
        ),
        ([("org/base", "f00d"), ("org/base", "beef")], ["base f00d", "base beef"]),
        ([("org/base", None), ("org/other", None)], ["base", "other"]),
    ],
)
def test_a_model_is_its_fingerprint(write_result, tmp_path, models, named):
    """It has one name, one line in a picture, and a name in labels only where there are several."""
    paths = []
    for number, (base_model, fingerprint) in enumerate(models):
        content = result("wanda", 0.5 + number / 10, 20.0)
        content["model"] |= {"base_model": base_model, "fingerprint": fingerprint}
        paths.append(write_result(f"r{number}", content))
    entries = sorted(read_entries(paths), key=lambda entry: entry.sparsity)
    assert [entry.model for entry in entries] == named
    assert all((", " in entry.label) == (len(set(named)) > 1) for entry in entries)
    compare_command(paths, output_dir=str(tmp_path / "out"))
    drawn = (tmp_path / "out" / "perplexity-1-held-out.svg").read_text(encoding="utf-8")
    assert sum(drawn.count(f">wanda, {name}<") for name in set(named)) == (
        len(set(named)) if len(set(named)) > 1 else 0
    )


def test_accuracies_are_in_percent(four_results, write_result):
    (row,) = (row for row in make_table(read_entries(four_results), BASELINES).rows if row[0] == "leap 50%")
    assert {"75.00 ± 20.00", "+25.00 ± 25.00 (wanda)"} <= {*row}
    several = result("leap", 0.5, 14.0, "1110")
    several["tasks"]["boolq"] = several["tasks"]["piqa"]
    (row,) = make_table(read_entries([write_result("several", several)]), BASELINES).rows
    assert (row.count("75.0 ± 20.0"), row.count("75.00 ± 14.14")) == (2, 1)  # tasks, and their mean


def test_a_quick_look_is_told(write_result):
    content = result("leap", 0.5, 14.0)
    assert not any("quick look" in note for note in make_table(read_entries([write_result("a", content)]), ()).notes)
    content["tasks"]["piqa"]["limit"] = 10
    notes = make_table(read_entries([write_result("b", content)]), BASELINES).notes
    assert any("a quick look, at the first 10 questions of each task" in note for note in notes)


def test_other_texts_and_other_tasks_have_columns_of_their_own(write_result, tmp_path):
    other = result("wanda", 0.5, 20.0)
    other["perplexity"]["c4"] = {**other["perplexity"].pop("held-out.jsonl"), "seq_length": 2048}
    other["tasks"]["boolq"] = copy.deepcopy(other["tasks"]["piqa"])
    compare_command(
        [write_result("one", result("leap", 0.5, 14.0)), write_result("two", other)], output_dir=str(tmp_path / "out")
    )
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open(encoding="utf-8")))
    assert {row["perplexity.c4.value"] for row in rows} == {"", "20.0"}
    assert "accuracy on piqa, %" in (tmp_path / "out" / "accuracy.svg").read_text(encoding="utf-8")
    assert {row["tasks.boolq.acc"] for row in rows} == {"", "0.5"}
    assert all(float(row["accuracy.value"]) == 0.5 for row in rows)  # over piqa, which both have


def test_csv_has_no_formulas(write_result, tmp_path):
    content = result("=HYPERLINK(1)", 0.5, 20.0)
    compare_command([write_result("@one", content)], output_dir=str(tmp_path / "out"))
    (row,) = csv.DictReader((tmp_path / "out" / "table.csv").open(encoding="utf-8"))
    assert row["method"] == "'=HYPERLINK(1)"
    assert not any(str(value).startswith(("=", "@", "+")) for value in row.values())
    assert float(row["perplexity.held-out.jsonl.value"]) == 20.0


def test_a_task_without_accuracy_hides_no_means(write_result):
    math_only = result("wanda", 0.5, 20.0)
    score = {key: value for key, value in math_only["tasks"]["piqa"].items() if not key.startswith("acc")}
    math_only["tasks"] = {"gsm8k": score | {"exact_match_strict-match": 0.25, "correct": ""}}
    entries = read_entries([write_result("one", result("leap", 0.5, 14.0)), write_result("two", math_only)])
    table = make_table(entries, BASELINES)
    assert "piqa, %" in " ".join(table.headings)
    assert "Not shown: gsm8k, which have no accuracy" in " ".join(table.notes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seq_length": 4096}, r"differ in seq_length \(512 and 4096\)\."),
        ({"stride": 256}, r"differ in stride \(512 and 256\)\."),
        ({"text_digest": "xyz", "tokens": 99}, r"text \(4,096 tokens with digest abc and 99 tokens with digest xyz\)"),
        (
            {"tokenizer": {"digest": "fed", "vocabulary": 9}, "text_digest": "x"},
            r"differ in tokenizer \(257 entries with digest dad and 9 entries with digest fed\)\.",
        ),
    ],
)
def test_refuses_other_protocols_in_one_column(write_result, change, says):
    other = result("wanda", 0.5, 20.0)
    other["perplexity"]["held-out.jsonl"].update(change)
    sources = [write_result("one", result("leap", 0.5, 14.0)), write_result("two", other)]
    with pytest.raises(UserError, match=says) as caught:
        compare_command(sources)
    assert all(source in str(caught.value) for source in sources)


@pytest.mark.parametrize(
    "change", [{"split": "test"}, {"limit": 10}, {"num_fewshot": 5}, {"samples": 7}, {"version": 9.5}]
)
def test_refuses_accuracies_measured_otherwise(write_result, change):
    other = result("wanda", 0.5, 20.0)
    other["tasks"]["piqa"].update(change)
    with pytest.raises(UserError, match=next(iter(change))):
        compare_command([write_result("one", result("leap", 0.5, 14.0)), write_result("two", other)])


def test_refuses_accuracies_on_other_questions(write_result):
    told = []
    for name, digest in (("leap", None), ("wanda", "abc"), ("admm", "abc"), ("magnitude", "def")):
        content = result(name, 0.5, 20.0)
        content["tasks"]["piqa"] |= {} if digest is None else {"questions_digest": digest}
        told.append(write_result(name, content))
    read_entries(told[:3])
    for sources in (told, told[::-1], told[1::2]):
        with pytest.raises(
            UserError, match=r"accuracy on piqa .* they differ in questions \((abc and def|def and abc)\)"
        ):
            read_entries(sources)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"split": "test"}, r"Read both from the same place: --tasks_folder FOLDER, or hub, or compare"),
        ({"split": "test", "limit": 10}, r"Evaluate both with the same flags, or compare"),
    ],
)
def test_where_questions_are_from_is_told(write_result, change, says):
    contents = [result("leap", 0.5, 14.0), result("wanda", 0.5, 20.0)]
    for content, source in zip(contents, ("local", "hub"), strict=True):
        content["tasks"]["piqa"]["source"] = source
    contents[1]["tasks"]["piqa"].update(change)
    with pytest.raises(UserError, match=says):
        read_entries([write_result(name, content) for name, content in zip("ab", contents, strict=True)])


def test_two_texts_of_one_name_keep_their_figures(write_result):
    """A text may have the name of another in another result: the shorter name is then nobody's."""

    def named(method, *texts):
        content = result(method, 0.5, 20.0)
        figure = content["perplexity"].pop("held-out.jsonl")
        for name, digest in texts:
            content["perplexity"][name] = figure | {"text_digest": digest}
        return write_result(method, content)

    one, two = named("leap", ("a.jsonl", "x")), named("wanda", ("a.jsonl", "y"), ("../one/a.jsonl", "x"))
    for sources in ([one, two], [two, one]):
        found = {entry.method: entry.perplexity for entry in read_entries(sources)}
        digests = {method: {name: figure["text_digest"] for name, figure in of.items()} for method, of in found.items()}
        assert digests == {"leap": {"../one/a.jsonl": "x"}, "wanda": {"a.jsonl": "y", "../one/a.jsonl": "x"}}
    both = read_entries([named("leap", ("a.jsonl", "x")), named("admm", ("../one/a.jsonl", "x"))])
    assert [list(entry.perplexity) for entry in both] == [["a.jsonl"]] * 2


def test_figures_share_a_column_where_sequences_begin_alike(write_result):
    def begun(name, text, task):
        content = result(name, 0.5, 20.0)
        content["perplexity"]["held-out.jsonl"] |= {} if text is None else {"bos": text}
        content["tasks"]["piqa"] |= {} if task is None else {"bos": task}
        return write_result(f"{name}-{text}-{task}", content)

    # Without the entry: of an earlier version, or of a tokenizer that puts nothing before a text.
    earlier = begun("wanda", None, None)
    read_entries([earlier, begun("leap", "first", "every")])
    for other, says in (
        (begun("admm", "every", "every"), r"perplexity on held-out\.jsonl .* they differ in bos \(every and first\)\."),
        (begun("admm", "first", "none"), r"accuracy on piqa .* they differ in bos \(none and every\)\."),
    ):
        with pytest.raises(UserError, match=says):
            read_entries([earlier, other])
    both = read_entries([begun("wanda", "every", "every"), begun("leap", "every", "every")])
    notes = " ".join(make_table(both, BASELINES).notes)
    assert "windows of 512 tokens, each beginning with BOS, stride 512, 4,096 tokens" in notes


def test_error_of_a_difference_is_of_pairs(write_result):
    leap, wanda = result("leap", 0.5, 14.0, "1110"), result("wanda", 0.5, 20.0, "1101")
    figure = leap["perplexity"]["held-out.jsonl"]
    figure["window_nll"][0] += 0.08
    figure["nll"] += 0.01
    figure["value"] = math.exp(figure["nll"])
    entries = read_entries([write_result("a", leap), write_result("b", wanda)])
    entry = next(e for e in entries if e.method == "leap")
    found = perplexity_difference(entry, entries, "held-out.jsonl", BASELINES)
    a, b = entry.perplexity["held-out.jsonl"], wanda["perplexity"]["held-out.jsonl"]
    weighed = [a["value"] * x - b["value"] * y for x, y in zip(a["window_nll"], b["window_nll"], strict=True)]
    assert found.value == pytest.approx(a["value"] - 20.0)
    assert found.stderr == pytest.approx(statistics.stdev(weighed) / 8**0.5)
    assert found.stderr < math.hypot(a["value"], 20.0) * statistics.stdev(b["window_nll"]) / 8**0.5
    accuracy = accuracy_difference(entry, entries, ["piqa"], BASELINES)
    assert accuracy.value == 0
    assert accuracy.stderr == pytest.approx(statistics.stdev([0, 0, 1, -1]) / 2)


def test_error_of_a_difference_weighs_windows_by_their_tokens(write_result):
    """Of windows of 8 tokens with a stride of 2 the first predicts 7, and each other 2."""
    counts, seeds = [7, 2, 2, 2], {"leap": [0.3, 0.1, 0.2, 0.7], "wanda": [0.4, 0.6, 0.1, 0.3]}
    made = {}
    for method, windows in seeds.items():
        one = result(method, 0.5, 20.0)
        nll = sum(n * x for n, x in zip(counts, windows, strict=True)) / 13
        one["perplexity"]["held-out.jsonl"] |= {"seq_length": 8, "stride": 2, "predicted": 13, "tokens": 14}
        one["perplexity"]["held-out.jsonl"] |= {"window_nll": windows, "nll": nll, "value": math.exp(nll)}
        made[method] = one["perplexity"]["held-out.jsonl"]
        seeds[method] = write_result(method, one)
    entries = read_entries([*seeds.values()])
    found = perplexity_difference(next(e for e in entries if e.method == "leap"), entries, "held-out.jsonl", BASELINES)
    a, b = made["leap"], made["wanda"]
    moved = [
        n * (a["value"] * (x - a["nll"]) - b["value"] * (y - b["nll"]))
        for n, x, y in zip(counts, a["window_nll"], b["window_nll"], strict=True)
    ]
    assert sum(moved) == pytest.approx(0)
    shares = [
        n * (x - a["nll"] - (y - b["nll"])) for n, x, y in zip(counts, a["window_nll"], b["window_nll"], strict=True)
    ]
    error = a["value"] / b["value"] * math.sqrt(4 / 3 * sum(share * share for share in shares)) / 13
    assert found.relative_stderr == pytest.approx(error)
    assert found.stderr == pytest.approx(math.sqrt(4 / 3 * sum(m * m for m in moved)) / 13)


def measured(windows):
    """An entry with the NLL of windows of as many tokens."""
    nll = statistics.fmean(windows)
    figure = {"value": math.exp(nll), "nll": nll, "window_nll": list(windows)}
    return Entry("x.json", "x", "leap", "org/base", "f00d", 0.5, perplexity={"text": figure})


def test_a_ratio_has_no_error_where_all_windows_moved_alike():
    """The difference has one, of how hard the windows are, and so has the baseline that it is a share of."""
    windows = [3.1, 2.2, 2.9, 3.6, 2.4]
    found = perplexity_difference_to(measured([x - 0.3 for x in windows]), measured(windows), "text")
    assert found.relative == pytest.approx(math.exp(-0.3) - 1)
    assert found.relative_stderr == pytest.approx(0, abs=1e-12)
    assert found.stderr / found.of == pytest.approx((1 - math.exp(-0.3)) * statistics.stdev(windows) / 5**0.5)
    assert perplexity_difference_to(measured(windows), measured(windows[1:]), "text").relative_stderr is None


def test_error_of_a_ratio_is_its_deviation_over_texts():
    """Of 3,000 texts of 48 windows, whose difficulty is shared; independent of the formula."""
    generator = random.Random(0)
    found = []
    for _ in range(3000):
        hard = [generator.gauss(3.0, 0.4) for _ in range(48)]
        moved = [x + generator.gauss(-0.4, 0.05) - 0.1 * (x - 3.0) for x in hard]
        found.append(perplexity_difference_to(measured(moved), measured(hard), "text"))
    deviation = statistics.stdev(difference.relative for difference in found)
    assert math.sqrt(statistics.fmean(d.relative_stderr**2 for d in found)) == pytest.approx(deviation, rel=0.05)
    assert statistics.fmean(d.stderr / d.of for d in found) > 2 * deviation


def test_baseline_is_of_the_same_sparsity_and_model(write_result):
    other = result("wanda", 0.5, 5.0)
    other["model"]["fingerprint"] = "beef"
    paths = [
        write_result("a", result("leap", 0.5, 14.0)),
        write_result("b", result("wanda", 0.6, 20.0)),
        write_result("c", other),
    ]
    entries = read_entries(paths)
    assert all(perplexity_difference(e, entries, "held-out.jsonl", BASELINES) is None for e in entries)


def test_a_baseline_with_a_file_name_is_that_in_a_cell(write_result):
    paths = [write_result(name, result(name.split("-")[0], 0.5, value)) for name, value in (
        ("leap", 14.0), ("wanda-a", 20.0), ("wanda-b", 30.0))]  # fmt: skip
    (row,) = [row for row in make_table(read_entries(paths), BASELINES).rows if row[0] == "leap 50%"]
    assert any(cell.endswith(" (wanda-a)") for cell in row), row


def test_the_verdict_is_the_best_at_each_sparsity(four_results, write_result):
    entries = read_entries([*four_results, write_result("more", result("leap", 0.6, 30.0))])
    said = verdict(entries, BASELINES)
    assert said == (
        "Lowest perplexity on held-out.jsonl: leap 50% with 14.00, 30% below wanda 50%, dense 10.00; "
        "leap 60% with 30.00, dense 10.00."
    )
    scored = [replace(entry, perplexity={}) for entry in entries]
    said = verdict(scored, BASELINES)
    assert said.startswith("Highest mean accuracy: leap 50% with 75.0%, +25.0 points against wanda")
    assert verdict([replace(entry, tasks={}) for entry in scored], BASELINES) == ""


@pytest.mark.parametrize("sparsity", [0.125, 0.625, 0.875])
def test_the_verdict_takes_results_of_one_sparsity_together_as_the_table_does(sparsity: float, write_result) -> None:
    """Their masks differ by some weights, which whole percent may divide."""
    below, above = result("leap", sparsity - 1e-4, 15.0), result("wanda", sparsity + 1e-4, 20.0)
    for paths in ([write_result("a", below), write_result("b", above)], [write_result("b", above)]):
        said = verdict(read_entries([*paths, write_result("a", below)] if len(paths) == 1 else paths), BASELINES)
        assert said.startswith("Lowest perplexity on held-out.jsonl: leap ")
        assert "with 15.00, 25% below wanda" in said
        assert ";" not in said


def test_wide_tables_are_divided(write_result):
    paths = []
    for method in ("dense", "wanda", "leap"):
        content = result(method, 0.0 if method == "dense" else 0.5, 20.0)
        content["tasks"] = {} if method == "dense" else {f"task_{n}": content["tasks"]["piqa"] for n in range(6)}
        paths.append(write_result(method, content))
    table = make_table(read_entries(paths), BASELINES)
    main, tasks = table.tables()
    assert [row[0] for row in main] == ["model", "dense", "leap 50%", "wanda 50%"]
    assert [row[0] for row in tasks] == ["model", "leap 50%", "wanda 50%"]  # the dense model has no figure there
    assert tasks[0][1:] == [f"task_{n}, %" for n in range(6)]
    cells = sorted(cell for row in (table.headings, *table.rows) for cell in row[1:] if cell)
    for width in (20, 70, 100, None):
        text = table.text(width)
        lines = text.split("\n\nPerplexity on")[0].splitlines()
        assert width in (20, None) or max(map(len, text.splitlines())) <= width
        assert not any(re.match("model +− best baseline", line) for line in lines)
        found = [re.split("  +", line.strip()) for line in lines if line and not line.startswith("-")]
        assert sorted(cell for line in found for cell in line if cell not in [r[0] for r in main]) == cells


@pytest.mark.parametrize(("sparsity", "alike"), [(0.505, True), (0.52, False)])
def test_a_baseline_is_of_nearly_the_same_sparsity(sparsity, alike, write_result):
    paths = [write_result("a", result("leap", 0.5, 14.0)), write_result("b", result("wanda", sparsity, 20.0))]
    entries = read_entries(paths)
    (leap,) = [entry for entry in entries if entry.method == "leap"]
    (text,) = leap.perplexity
    assert (perplexity_difference(leap, entries, text, {"wanda"}) is not None) == alike
