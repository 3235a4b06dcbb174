"""The masks of a comparison: whose they are, and how much two of them share."""

import json
from pathlib import Path

import pytest
import torch
from made_results import NAMES, mask_file, result

from leap_pl.cli.compare import compare_command
from leap_pl.comparison.entries import read_entries
from leap_pl.comparison.overlap import overlap
from leap_pl.masks import MaskSet, Provenance
from leap_pl.masks.weight_groups import split_name


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


def test_overlap_is_of_the_weights_that_both_masks_have(tmp_path):
    masks = [{NAMES[0]: torch.eye(4).bool(), NAMES[1]: torch.eye(4).bool()}]
    masks.append({NAMES[1]: torch.eye(4).bool(), NAMES[2]: torch.eye(4).bool()})
    sources = [
        str(MaskSet(mask, Provenance("org/base", "f00d", method, 0.75)).save(tmp_path / f"{method}.safetensors"))
        for method, mask in zip(("wanda", "leap"), masks, strict=True)
    ]
    found = overlap(*read_entries(sources))
    assert (found.iou, [*found.layers]) == (1, [0])


def test_the_densities_of_a_mask_are_the_shares_that_it_keeps(tmp_path):
    (entry,) = read_entries([mask_file(tmp_path / "a.safetensors", "leap", 1, density=0.3)])
    assert len(entry.densities) == len(NAMES)
    for name, mask in entry.mask.masks.items():
        assert entry.densities[split_name(name)] == pytest.approx(float(mask.float().mean()))


def test_checkpoint_is_its_hard_mask(finished):
    (first,), (second,) = read_entries([str(finished.checkpoint)]), read_entries([str(finished.mask)])
    assert overlap(first, second).iou == 1
    assert first.sparsity == second.sparsity
    (both,) = read_entries([str(finished.checkpoint), str(finished.mask)])
    assert (both.source, both.also) == (str(finished.checkpoint), (str(finished.mask),))


def test_a_mask_and_a_text_are_known_by_their_content(write_result, tmp_path):
    """The mask of a result, wherever it lies, is that result's row, and a path typed otherwise no other text."""
    path = mask_file(tmp_path / "a.safetensors", "leap", 1)
    moved = tmp_path / "moved.safetensors"
    learned, other = result("leap", 0.5, 14.0, mask=path), result("wanda", 0.5, 20.0)
    other["perplexity"]["/home/me/held-out.jsonl"] = other["perplexity"].pop("held-out.jsonl")
    sources = [write_result("leap", learned), write_result("wanda", other), str(moved)]
    Path(path).rename(moved)
    entries = {entry.method: entry for entry in read_entries(sources)}
    assert len(entries) == 2
    assert entries["leap"].mask is not None
    assert entries["leap"].also == (str(moved),)
    assert [[*entry.perplexity] for entry in entries.values()] == [["held-out.jsonl"]] * 2
    compare_command(sources, output_dir=str(tmp_path / "out"))
    assert str(moved) in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_a_mask_that_took_the_place_of_the_measured_one_is_not_taken(write_result, tmp_path):
    path = mask_file(tmp_path / "a.safetensors", "wanda", 1)
    measured = write_result("a", result("wanda", 0.5, 20.0, mask=path))
    silent = json.loads(Path(measured).read_text())
    del silent["model"]["mask_digest"]
    old = write_result("old", silent)
    assert [entry.mask is not None for entry in read_entries([measured, old])] == [True, False]
    mask_file(tmp_path / "a.safetensors", "wanda", 2)  # of the same base model
    assert read_entries([measured])[0].mask is None
