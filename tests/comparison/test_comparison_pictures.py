"""The pictures: what is drawn, in which order, and what is not."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from made_results import NAMES, result
from matplotlib.backends.backend_agg import FigureCanvasAgg

from leap_pl.cli.compare import compare_command
from leap_pl.comparison import pictures
from leap_pl.comparison.entries import read_entries
from leap_pl.comparison.overlap import Overlap
from leap_pl.comparison.pictures import _against_sparsity, _differences, _overlaps
from leap_pl.comparison.table import is_level
from leap_pl.masks import MaskSet, Provenance
from leap_pl.masks.weight_groups import split_name

BASELINES = ("magnitude", "wanda")


def test_differences_are_drawn_relative_to_the_baseline(four_results, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "save", lambda figure, folder, stem, caption: drawn.append(figure))
    entries = read_entries(four_results)
    (leap,) = [entry for entry in entries if entry.method == "leap"]
    leap.perplexity["held-out.jsonl"]["window_nll"][0] += 0.1  # of 8 windows, which else differ alike
    _differences(entries, BASELINES, ["held-out.jsonl"], ["piqa"], tmp_path)
    perplexity, accuracy = drawn[0].axes
    assert perplexity.lines[1].get_xdata() == pytest.approx([-30.0])  # 14 of 20
    (bar,) = perplexity.containers[0][2][0].get_segments()[:1]
    assert bar[1][0] - bar[0][0] == pytest.approx(2 * 70.0 * 0.1 / 8)  # ± percent of the baseline
    assert accuracy.lines[1].get_xdata() == pytest.approx([25.0])  # points
    (bar,) = accuracy.containers[0][2][0].get_segments()[:1]
    assert bar[1][0] - bar[0][0] == pytest.approx(2 * 25.0)  # ± points


def test_no_row_is_hidden_and_the_legend_has_the_order_of_the_lines(write_result):
    """Two rows of one method and sparsity have a line each; points of one sparsity lie beside one another.

    However many methods there are at other sparsities, the step is at least a marker's width.
    """
    paths = [write_result(name, result(method, 0.5, value)) for name, method, value in (
        ("a", "leap", 14.0), ("b", "leap", 15.0), ("c", "wanda", 40.0), ("d", "admm", 14.0))]  # fmt: skip
    paths += [write_result(f"e{n}", result(f"other {n}", 0.6, 100.0)) for n in range(9)]
    paths.append(write_result("dense", result("dense", 0.0, 20.0)))
    points = [(e, e.perplexity["held-out.jsonl"]["value"], None) for e in read_entries(paths)]
    figure = _against_sparsity(points, "perplexity", logarithmic=True)
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend[9:] == ["wanda", "dense (20.00)", "leap 50% (b)", "admm", "leap 50% (a)"]
    places = sorted({line.get_xdata()[0] for line in figure.axes[0].lines if len(line.get_xdata()) == 1})
    assert len(places) == 4 + 9
    assert min(right - left for left, right in pairwise(places)) > 0.19
    assert sum(places[:4]) / 4 == pytest.approx(50)
    assert sum(places[4:]) / 9 == pytest.approx(60)


def test_heat_maps_share_their_order(write_result, monkeypatch):
    """A mask lists its weights by name, and a result as the model has them."""
    grids = []
    monkeypatch.setattr(pictures, "_heat_map", lambda grid, columns, rows, **_: grids.append((columns, rows, grid)))
    monkeypatch.setattr(pictures, "save", lambda *arguments: None)
    paths = []
    for number, names in enumerate((NAMES, NAMES[::-1])):
        content = result("leap", 0.5 + number / 10, 14.0)
        content["sparsity"]["weights"] = {name: 0.3 + 0.05 * NAMES.index(name) for name in names}
        paths.append(write_result(f"r{number}", content))
    pictures.draw_all([replace(e, perplexity={}, tasks={}) for e in read_entries(paths)], BASELINES, Path())
    density = {name: 1 - (0.3 + 0.05 * NAMES.index(name)) for name in NAMES}
    for columns, rows, grid in grids:
        assert (columns, rows) == (["0", "1", "2"], ["mlp.up_proj", "self_attn.q_proj"])
        for row, projection in zip(grid, rows, strict=True):
            expected = [density[f"model.layers.{layer}.{projection}.weight"] for layer in columns]
            assert row == pytest.approx(expected)
    assert len(grids) == 2


def test_figures_are_drawn_in_their_units(four_results, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "_against_sparsity", lambda points, ylabel, **_: drawn.append((ylabel, points)))
    monkeypatch.setattr(pictures, "save", lambda *arguments: None)
    monkeypatch.setattr(pictures, "_differences", lambda *arguments: [])
    entries = read_entries(four_results)
    pictures.draw_all([replace(entry, densities={}, mask=None) for entry in entries], BASELINES, tmp_path)
    (of_text, perplexities), (of_task, accuracies) = drawn
    assert of_text == "perplexity on held-out.jsonl"
    assert [value for _, value, _ in perplexities] == [e.perplexity["held-out.jsonl"]["value"] for e in entries]
    assert [error for *_, error in perplexities] == [e.perplexity["held-out.jsonl"]["stderr"] for e in entries]
    assert of_task == "accuracy on piqa, %"
    scored = [entry for entry in entries if entry.tasks]
    assert [value for _, value, _ in accuracies] == pytest.approx([100 * e.tasks["piqa"]["acc"] for e in scored])
    assert [error for *_, error in accuracies] == pytest.approx([100 * e.tasks["piqa"]["acc_stderr"] for e in scored])


@pytest.mark.parametrize(
    ("weights", "level"),
    [
        ([0.5] * 6, True),
        ([0.3993, 0.3997] * 3, True),  # rows of two widths, in every layer
        ([0.5, 0.5, 0.5004, 0.5, 0.5, 0.5], False),  # learned, however little
        ([0.5, 0.6] * 3, False),
    ],
)
def test_only_what_is_level_but_for_rounding_is_not_drawn(write_result, weights, level):
    content = result("wanda", 0.5, 20.0)
    content["sparsity"]["weights"] = dict(zip(NAMES, weights, strict=True))
    (entry,) = read_entries([write_result("r", content)])
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
    (told,) = (label.get_text() for label in figure.axes[0].get_yticklabels())
    assert told.endswith("0.940 in all (chance 0.260)")


@pytest.mark.parametrize(
    ("weights", "models"),
    [
        (["lm_head.weight", "lm_head.weight"], ["a", "a"]),  # no layer of the picture has it
        ([NAMES[0], NAMES[0]], ["a", "b"]),  # of two models
    ],
)
def test_masks_without_an_overlap_to_draw(weights, models, tmp_path):
    paths = []
    for method, name, model in zip(("wanda", "leap"), weights, models, strict=True):
        mask = MaskSet({name: torch.eye(8).bool()}, Provenance(f"org/{model}", f"f00d{model}", method, 0.875))
        paths.append(str(mask.save(tmp_path / f"{method}.safetensors")))
    compare_command(paths, output_dir=str(tmp_path / "out"))
    assert (tmp_path / "out" / "table.md").is_file()
    assert not list((tmp_path / "out").glob("overlap*"))


def test_a_result_has_the_densities_of_its_mask(write_result):
    content = result("wanda", 0.4, 20.0)
    shares = {name: 0.1 + 0.1 * number for number, name in enumerate(content["sparsity"]["weights"])}
    content["sparsity"]["weights"] = shares
    (entry,) = read_entries([write_result("a", content)])
    for name, share in shares.items():
        assert entry.densities[split_name(name)] == pytest.approx(1 - share)
