"""leap_pl compare: what shares a column, the differences, the files, the page."""

import copy
import csv
import json
import math
import re
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from made_results import NAMES, result
from matplotlib.backends.backend_agg import FigureCanvasAgg

from leap_pl.cli.compare import compare_command
from leap_pl.comparison import pictures
from leap_pl.comparison.differences import _rivals, accuracy_difference, perplexity_difference
from leap_pl.comparison.entries import read_entries
from leap_pl.comparison.overlap import Overlap, overlap
from leap_pl.comparison.pictures import _against_sparsity, _differences, _overlaps
from leap_pl.comparison.table import is_level, make_table
from leap_pl.comparison.verdict import verdict
from leap_pl.errors import UserError
from leap_pl.masks import MaskSet, Provenance

BASELINES = ("magnitude", "wanda")


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        return str(path)

    return write


def test_patterns_are_told_apart_and_compared_with_their_own(write, tmp_path):
    """2:4 masks have a name and a line of their own, and an n:m mask's rival is one of its pattern."""
    sources = []
    for method, pattern, value in (("wanda", None, 20.0), ("wanda", "2:4", 40.0), ("maskllm", "2:4", 30.0)):
        content = result(method, 0.5, value)
        if pattern is not None:
            content["config"] = {"pattern": pattern}
        sources.append(write(f"{method}-{pattern}".replace(":", ""), content))
    entries = {entry.label: entry for entry in read_entries(sources)}
    assert set(entries) == {"wanda 50%", "wanda 2:4 50%", "maskllm 2:4 50%"}
    learned = entries["maskllm 2:4 50%"]
    assert [rival.label for rival in _rivals(learned, list(entries.values()), BASELINES)] == ["wanda 2:4 50%"]


def mask_file(path, method, seed, density=0.5):
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(16, 16, generator=generator) < density for name in NAMES}
    return str(MaskSet(masks, Provenance("org/base", "f00d", method, 1 - density)).save(path))


@pytest.fixture
def sources(write, tmp_path):
    wanda, leap = (mask_file(tmp_path / f"{m}.safetensors", m, n) for n, m in enumerate(("wanda", "leap")))
    learned = result("leap", 0.501, 14.0, "1110", mask=leap)
    learned["sparsity"]["weights"] |= {NAMES[0]: 0.4, NAMES[1]: 0.602}
    return [
        write("dense", result("dense", 0.0, 10.0, "1111")),
        write("magnitude", result("magnitude", 0.5, 60.0, "1000")),
        write("wanda", result("wanda", 0.5, 20.0, "1100", mask=wanda)),
        write("leap", learned),
    ]


def test_writes_table_pictures_and_page(sources, tmp_path, capsys):
    out = tmp_path / "out"
    found = compare_command(sources, output_dir=str(out))
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


def test_wide_tables_are_divided(write):
    paths = []
    for method in ("dense", "wanda", "leap"):
        content = result(method, 0.0 if method == "dense" else 0.5, 20.0)
        content["tasks"] = {} if method == "dense" else {f"task_{n}": content["tasks"]["piqa"] for n in range(6)}
        paths.append(write(method, content))
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


def test_page_is_whole_in_itself(sources, tmp_path):
    compare_command(sources, output_dir=str(tmp_path / "out"))
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    addresses = re.findall(r"(?:src|href|url|@import)\s*[=(]?\s*[\"']([^\"']*)", page)
    assert len(addresses) == len(list((tmp_path / "out").glob("*.svg")))
    assert all(address.startswith("data:image/svg+xml;base64,") for address in addresses)
    assert "<script" not in page
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)


def test_same_inputs_same_files(sources, tmp_path):
    for place in ("a", "b"):
        compare_command(sources, output_dir=str(tmp_path / place))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_an_earlier_comparison_is_replaced_only_when_asked(sources, tmp_path):
    compare_command(sources, output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="--force"):
        compare_command(sources[:2], output_dir=str(tmp_path / "out"))
    compare_command(sources[:2], output_dir=str(tmp_path / "out"), force=True)
    assert not (tmp_path / "out" / "overlap.svg").exists()


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
def test_refuses_other_protocols_in_one_column(write, change, says):
    other = result("wanda", 0.5, 20.0)
    other["perplexity"]["held-out.jsonl"].update(change)
    sources = [write("one", result("leap", 0.5, 14.0)), write("two", other)]
    with pytest.raises(UserError, match=says) as caught:
        compare_command(sources)
    assert all(source in str(caught.value) for source in sources)


def test_other_texts_and_other_tasks_have_columns_of_their_own(write, tmp_path):
    other = result("wanda", 0.5, 20.0)
    other["perplexity"]["c4"] = {**other["perplexity"].pop("held-out.jsonl"), "seq_length": 2048}
    other["tasks"]["boolq"] = copy.deepcopy(other["tasks"]["piqa"])
    compare_command([write("one", result("leap", 0.5, 14.0)), write("two", other)], output_dir=str(tmp_path / "out"))
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open(encoding="utf-8")))
    assert {row["perplexity.c4.value"] for row in rows} == {"", "20.0"}
    assert "accuracy on piqa, %" in (tmp_path / "out" / "accuracy.svg").read_text(encoding="utf-8")
    assert {row["tasks.boolq.acc"] for row in rows} == {"", "0.5"}
    assert all(float(row["accuracy.value"]) == 0.5 for row in rows)  # over piqa, which both have


@pytest.mark.parametrize("change", [{"split": "test"}, {"limit": 10}, {"num_fewshot": 5}, {"samples": 7}])
def test_refuses_accuracies_measured_otherwise(write, change):
    other = result("wanda", 0.5, 20.0)
    other["tasks"]["piqa"].update(change)
    with pytest.raises(UserError, match=next(iter(change))):
        compare_command([write("one", result("leap", 0.5, 14.0)), write("two", other)])


def test_error_of_a_difference_is_of_pairs(write):
    leap, wanda = result("leap", 0.5, 14.0, "1110"), result("wanda", 0.5, 20.0, "1101")
    figure = leap["perplexity"]["held-out.jsonl"]
    figure["window_nll"][0] += 0.08
    figure["nll"] += 0.01
    figure["value"] = math.exp(figure["nll"])
    entries = read_entries([write("a", leap), write("b", wanda)])
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


def test_baseline_is_of_the_same_sparsity_and_model(write):
    other = result("wanda", 0.5, 5.0)
    other["model"]["fingerprint"] = "beef"
    paths = [write("a", result("leap", 0.5, 14.0)), write("b", result("wanda", 0.6, 20.0)), write("c", other)]
    entries = read_entries(paths)
    assert all(perplexity_difference(e, entries, "held-out.jsonl", BASELINES) is None for e in entries)


def test_a_mask_that_took_the_place_of_the_measured_one_is_not_taken(write, tmp_path):
    path = mask_file(tmp_path / "a.safetensors", "wanda", 1)
    measured = write("a", result("wanda", 0.5, 20.0, mask=path))
    silent = json.loads(Path(measured).read_text())
    del silent["model"]["mask_digest"]
    old = write("old", silent)
    assert [entry.mask is not None for entry in read_entries([measured, old])] == [True, False]
    mask_file(tmp_path / "a.safetensors", "wanda", 2)  # of the same base model
    assert read_entries([measured])[0].mask is None


def test_figures_share_a_column_where_sequences_begin_alike(write):
    def begun(name, text, task):
        content = result(name, 0.5, 20.0)
        content["perplexity"]["held-out.jsonl"] |= {} if text is None else {"bos": text}
        content["tasks"]["piqa"] |= {} if task is None else {"bos": task}
        return write(f"{name}-{text}-{task}", content)

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


def test_overlap_of_masks(tmp_path):
    one = mask_file(tmp_path / "a.safetensors", "wanda", 1)
    two = mask_file(tmp_path / "b.safetensors", "leap", 2)
    first, second = read_entries([one, two])
    found = overlap(first, second)
    assert found.iou == pytest.approx(found.chance, abs=0.05)  # independent masks
    assert overlap(first, first).iou == 1
    a, b = first.mask.masks[NAMES[0]], second.mask.masks[NAMES[0]]
    c, d = first.mask.masks[NAMES[1]], second.mask.masks[NAMES[1]]
    assert found.layers[0] == pytest.approx(float(((a & b).sum() + (c & d).sum()) / ((a | b).sum() + (c | d).sum())))


def test_checkpoint_is_its_hard_mask(finished):
    (first,), (second,) = read_entries([str(finished.checkpoint)]), read_entries([str(finished.mask)])
    assert overlap(first, second).iou == 1
    assert first.sparsity == second.sparsity
    (both,) = read_entries([str(finished.checkpoint), str(finished.mask)])
    assert (both.source, both.also) == (str(finished.checkpoint), (str(finished.mask),))


def test_a_mask_and_a_text_are_known_by_their_content(write, tmp_path):
    """The mask of a result, wherever it lies, is that result's row, and a path typed otherwise no other text."""
    path = mask_file(tmp_path / "a.safetensors", "leap", 1)
    moved = tmp_path / "moved.safetensors"
    learned, other = result("leap", 0.5, 14.0, mask=path), result("wanda", 0.5, 20.0)
    other["perplexity"]["/home/me/held-out.jsonl"] = other["perplexity"].pop("held-out.jsonl")
    sources = [write("leap", learned), write("wanda", other), str(moved)]
    Path(path).rename(moved)
    entries = {entry.method: entry for entry in read_entries(sources)}
    assert len(entries) == 2
    assert entries["leap"].mask is not None
    assert entries["leap"].also == (str(moved),)
    assert [[*entry.perplexity] for entry in entries.values()] == [["held-out.jsonl"]] * 2
    compare_command(sources, output_dir=str(tmp_path / "out"))
    assert str(moved) in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_the_verdict_is_the_best_at_each_sparsity(sources, write):
    entries = read_entries([*sources, write("more", result("leap", 0.6, 30.0))])
    said = verdict(entries, BASELINES)
    assert said == (
        "Lowest perplexity on held-out.jsonl: leap 50% with 14.00, 30% below wanda 50%, dense 10.00; "
        "leap 60% with 30.00, dense 10.00."
    )
    scored = [replace(entry, perplexity={}) for entry in entries]
    said = verdict(scored, BASELINES)
    assert said.startswith("Highest mean accuracy: leap 50% with 75.0%, +25.0 points against wanda")
    assert verdict([replace(entry, tasks={}) for entry in scored], BASELINES) == ""


def test_differences_are_drawn_relative_to_the_baseline(sources, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "_save", lambda figure, folder, stem, caption: drawn.append(figure))
    entries = read_entries(sources)
    _differences(entries, BASELINES, ["held-out.jsonl"], ["piqa"], tmp_path)
    perplexity, accuracy = drawn[0].axes
    assert perplexity.lines[1].get_xdata() == pytest.approx([-30.0])  # 14 of 20
    assert accuracy.lines[1].get_xdata() == pytest.approx([25.0])  # points


def test_no_row_is_hidden_and_the_legend_has_the_order_of_the_lines(write):
    """Two rows of one method and sparsity have a line each; points of one sparsity lie beside one another.

    However many methods there are at other sparsities, the step is at least a marker's width.
    """
    paths = [write(name, result(method, 0.5, value)) for name, method, value in (
        ("a", "leap", 14.0), ("b", "leap", 15.0), ("c", "wanda", 40.0), ("d", "admm", 14.0))]  # fmt: skip
    paths += [write(f"e{n}", result(f"other {n}", 0.6, 100.0)) for n in range(9)]
    paths.append(write("dense", result("dense", 0.0, 20.0)))
    points = [(e, e.perplexity["held-out.jsonl"]["value"], None) for e in read_entries(paths)]
    figure = _against_sparsity(points, "perplexity", logarithmic=True)
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend[9:] == ["wanda", "dense (20.00)", "leap 50% (b)", "admm", "leap 50% (a)"]
    places = sorted({line.get_xdata()[0] for line in figure.axes[0].lines if len(line.get_xdata()) == 1})
    assert len(places) == 4 + 9
    assert min(right - left for left, right in pairwise(places)) > 0.19
    assert sum(places[:4]) / 4 == pytest.approx(50)
    assert sum(places[4:]) / 9 == pytest.approx(60)


def test_heat_maps_share_their_order(write, monkeypatch):
    """A mask lists its weights by name, and a result as the model has them."""
    grids = []
    monkeypatch.setattr(pictures, "_heat_map", lambda grid, columns, rows, **_: grids.append((columns, rows)))
    monkeypatch.setattr(pictures, "_save", lambda *arguments: None)
    paths = []
    for number, names in enumerate((NAMES, NAMES[::-1])):
        content = result("leap", 0.5 + number / 10, 14.0)
        content["sparsity"]["weights"] = {name: 0.3 + 0.05 * NAMES.index(name) for name in names}
        paths.append(write(f"r{number}", content))
    pictures.draw_all([replace(e, perplexity={}, tasks={}) for e in read_entries(paths)], BASELINES, Path())
    assert grids == [(["0", "1", "2"], ["mlp.up_proj", "self_attn.q_proj"])] * 2


def test_masks_and_exported_folders_alone(tmp_path):
    (tmp_path / "exported").mkdir()
    mask_file(tmp_path / "exported" / "mask.safetensors", "leap", 2, density=0.4)
    alone = mask_file(tmp_path / "wanda.safetensors", "wanda", 1)
    compare_command([alone, str(tmp_path / "exported")], output_dir=str(tmp_path / "out"))
    stems = {path.stem for path in (tmp_path / "out").glob("*.svg")}
    assert {"overlap", "density-1-wanda-50", "density-2-leap-59"} <= stems
    assert not any(stem.startswith("perplexity") for stem in stems)


@pytest.mark.parametrize(
    ("weights", "level"),
    [
        ([0.5] * 6, True),
        ([0.3993, 0.3997] * 3, True),  # rows of two widths, in every layer
        ([0.5, 0.5, 0.5004, 0.5, 0.5, 0.5], False),  # learned, however little
        ([0.5, 0.6] * 3, False),
    ],
)
def test_only_what_is_level_but_for_rounding_is_not_drawn(write, weights, level):
    content = result("wanda", 0.5, 20.0)
    content["sparsity"]["weights"] = dict(zip(NAMES, weights, strict=True))
    (entry,) = read_entries([write("r", content)])
    assert is_level(entry) == level


def test_overlaps_are_of_one_sparsity(tmp_path):
    paths = []
    for method in ("wanda", "leap"):
        for kept in (50, 40):
            masks = {NAMES[0]: (torch.randperm(100) < kept).view(10, 10)}
            mask = MaskSet(masks, Provenance("org/base", "f00d", method, 1 - kept / 100))
            paths.append(str(mask.save(tmp_path / f"{method}-{kept}.safetensors")))
    compare_command(paths, output_dir=str(tmp_path / "out"))
    names = {path.stem for path in (tmp_path / "out").glob("overlap*.svg")}
    assert len(names) == 2
    for name in names:
        (pair,) = re.findall(r"(\w+ \d+%) ∩ (\w+ \d+%)", (tmp_path / "out" / f"{name}.svg").read_text(encoding="utf-8"))
        assert {label.split()[0] for label in pair} == {"leap", "wanda"}
        assert {label.split()[1] for label in pair} == {f"{name.split('-')[1]}%"}


def test_long_names_leave_the_numbers_of_the_layers_apart():
    names = ["LEAP, both losses, SparseSwaps prior, 60%", "SparseSwaps, Fisher allocation, 60%"]
    figure = _overlaps([Overlap(*names, 0.94, 0.26, dict.fromkeys(range(30), 0.9) | {0: 0.95})])
    FigureCanvasAgg(figure).draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert len(boxes) == 30
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_rows_are_ordered_by_sparsity_pattern_and_method(write):
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
        paths.append(write(f"r{len(paths)}", content))
    labels = [entry.label for entry in read_entries(paths)]
    assert labels == ["admm 50%", "wanda 50%", "admm 2:4 50%", "admm 60%"]


def test_a_baseline_with_a_file_name_is_that_in_a_cell(write):
    paths = [write(name, result(name.split("-")[0], 0.5, value)) for name, value in (
        ("leap", 14.0), ("wanda-a", 20.0), ("wanda-b", 30.0))]  # fmt: skip
    (row,) = [row for row in make_table(read_entries(paths), BASELINES).rows if row[0] == "leap 50%"]
    assert any(cell.endswith(" (wanda-a)") for cell in row), row


def test_labels_are_unique(write):
    paths = [write(name, result("leap", 0.5, 14.0)) for name in ("one", "two")]
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
def test_a_model_is_its_fingerprint(write, tmp_path, models, named):
    """It has one name, one line in a picture, and a name in labels only where there are several."""
    paths = []
    for number, (base_model, fingerprint) in enumerate(models):
        content = result("wanda", 0.5 + number / 10, 20.0)
        content["model"] |= {"base_model": base_model, "fingerprint": fingerprint}
        paths.append(write(f"r{number}", content))
    entries = sorted(read_entries(paths), key=lambda entry: entry.sparsity)
    assert [entry.model for entry in entries] == named
    assert all((", " in entry.label) == (len(set(named)) > 1) for entry in entries)
    compare_command(paths, output_dir=str(tmp_path / "out"))
    drawn = (tmp_path / "out" / "perplexity-1-held-out.svg").read_text(encoding="utf-8")
    assert sum(drawn.count(f">wanda, {name}<") for name in set(named)) == (
        len(set(named)) if len(set(named)) > 1 else 0
    )


def test_refuses_in_one_line(write, tmp_path):
    (tmp_path / "folder").mkdir()
    good = write("good", result("leap", 0.5, 14.0))
    lacking = {}
    for path in (("sparsity",), ("perplexity", "held-out.jsonl", "value"), ("tasks", "piqa", "split")):
        content = result("leap", 0.5, 14.0)
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        lacking[f"damaged: '{' > '.join(path)}' is missing or invalid"] = [write(path[-1], content)]
    cases = {
        "Nothing to compare": [],
        "named twice": [good, good],
        "no such file": [str(tmp_path / "gone.json")],
        r"holds no mask\.safetensors": [str(tmp_path / "folder")],
        "no result of leap_pl evaluate": [write("other", {"a": 1})],
        "there is no such checkpoint": [str(tmp_path / "gone.ckpt")],
        **lacking,
    }
    for says, sources in cases.items():
        with pytest.raises(UserError, match=says):
            compare_command(sources, output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
