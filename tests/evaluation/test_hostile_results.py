"""Results and masks whose values are none that leap_pl writes: one line that names the file and the key."""

import copy
import json
import math
import os
import re
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_files import NAMES, PROVENANCE, RESULT, SHAPES, mask_file
from hypothesis import given, settings
from hypothesis import strategies as st

from leap_pl.cli.compare import compare_command
from leap_pl.comparison.entries import read_entries
from leap_pl.errors import UserError
from leap_pl.evaluation.record import read_result, write_result
from leap_pl.evaluation.subject import exported_record
from leap_pl.inputs.plain_values import MOST_BYTES, parse_json, plain, shown
from leap_pl.masks import MaskSet, Provenance, split_name
from leap_pl.masks.provenance_schema import Config, ProvenanceFields, provenance_fields

TEXT = "held-out.jsonl"


def result_with(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    content = copy.deepcopy(RESULT)
    change(content)
    return content


def refused(read: Callable[[], object], path: Path) -> str:
    """The one line with which ``path`` is refused."""
    with pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message
    assert len(message) < 1000
    return message


# -- results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "spelled"),
    [
        ("perplexity > held-out.jsonl > value", "1e400"),
        ("perplexity > held-out.jsonl > value", "1" + "0" * 400),
        ("perplexity > held-out.jsonl > value", "NaN"),
        ("perplexity > held-out.jsonl > value", "-Infinity"),
        ("perplexity > held-out.jsonl > value", "0"),
        ("perplexity > held-out.jsonl > value", '"14"'),
        ("perplexity > held-out.jsonl > value", "true"),
        ("perplexity > held-out.jsonl > value", "[14]"),
        ("perplexity > held-out.jsonl > seq_length", "1.5"),
        ("perplexity > held-out.jsonl > seq_length", "-512"),
        ("perplexity > held-out.jsonl > stderr", '{"a": 1}'),
        ("perplexity > held-out.jsonl > window_nll > 0", '"a"'),
        ("perplexity > held-out.jsonl > window_nll > 1", "null"),
        ("perplexity > held-out.jsonl > tokenizer", "[]"),
        ("tasks > piqa", "[]"),
        ("tasks > piqa", '{"acc": 7, "split": "x", "limit": null, "num_fewshot": 0, "version": 1, "samples": 4}'),
        ("tasks > piqa > version", "{}"),
        ("tasks > piqa > correct", '"11x0"'),
        ("sparsity > global", "1.5"),
        ("sparsity > weights > model.layers.0.mlp.up.weight", "NaN"),
        ("sparsity > weights", "[0.5]"),
        ("method", "{}"),
        ("method", '"' + "x" * 300 + '"'),
        ("method", '"\\ud800"'),
        ("model > base_model", "7"),
        ("model > mask", "[1]"),
        ("config > pattern", "2.4"),
        ("config > pattern", '"' + "9" * 60 + ':1"'),
        ("config > data", '"text"'),
        ("config > gate > x", "NaN"),
        ("mean > tasks", '"piqa"'),
        ("versions > torch", "2"),
        ("times > seconds > total", "1e999"),
    ],
)
def test_a_wrong_value_is_told_with_its_file_and_key(tmp_path: Path, place: str, spelled: str) -> None:
    content, keys = copy.deepcopy(RESULT), [int(key) if key.isdigit() else key for key in place.split(" > ")]
    holder: Any = content
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = "hole"
    path = tmp_path / "result.json"
    path.write_text(json.dumps(content).replace('"hole"', spelled))
    for read in (lambda: read_result(path), lambda: compare_command([str(path)], output_dir=str(tmp_path / "out"))):
        message = refused(read, path)
        assert f"'{place}'" in message
    assert not (tmp_path / "out").exists()


def _required(value: Any, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    optional = {"config", "mean", "seed", "batch_size", "versions", "commit", "times", "class", "asked", "source"}
    optional |= {"window_nll", "correct", "acc", "acc_stderr", "acc_norm", TEXT, "piqa"}
    found = []
    for key, inner in value.items():
        if key not in optional:
            found.append((*above, key))
        if isinstance(inner, dict) and key not in ("config", "mean", "times", "versions", "weights"):
            found += _required(inner, (*above, key))
    return found


@pytest.mark.parametrize("place", [p for p in _required(RESULT) if p[0] not in ("format", "format_version")])
def test_a_missing_key_is_told(tmp_path: Path, place: tuple[str, ...]) -> None:
    content = copy.deepcopy(RESULT)
    holder: Any = content
    for key in place[:-1]:
        holder = holder[key]
    del holder[place[-1]]
    path = tmp_path / "result.json"
    path.write_text(json.dumps(content))
    assert f"'{' > '.join(place)}' is missing or invalid (required)" in refused(lambda: read_entries([str(path)]), path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[" * 200_000 + b"]" * 200_000, "nested"),
        (b'{"a":' * 50 + b"1" + b"}" * 50, "nested"),
        (b'{"format": 1, "format": 2}', "key format twice"),
        (b'{"a": "\xff\xfe"}', "not UTF-8 text at byte 7"),
        (b'\xef\xbb\xbf{"format": 1}', "BOM"),
        (b"", "Expecting value"),
        (b"null", "no result"),
        (b'"leap_pl.evaluation"', "no result"),
    ],
)
def test_what_is_no_such_json(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(data)
    assert words in refused(lambda: read_result(path), path)


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    large, pipe = tmp_path / "large.json", tmp_path / "pipe.json"
    with large.open("wb") as file:
        file.truncate(1 << 40)  # of which the disk holds nothing
    os.mkfifo(pipe)
    tracemalloc.start()
    began = time.monotonic()
    assert "larger than 16 MiB" in refused(lambda: read_result(large), large)
    for endless in (pipe, Path("/dev/zero")):
        assert "not a regular file" in refused(lambda endless=endless: read_result(endless), endless)
    assert tracemalloc.get_traced_memory()[1] < 4 * MOST_BYTES
    tracemalloc.stop()
    assert time.monotonic() - began < 60


def test_thousands_of_keys_and_unknown_ones(tmp_path: Path) -> None:
    """What is not known is left out, and a great deal of what is known is refused."""
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**RESULT, **{f"k{n}": [n] for n in range(50_000)}}))
    assert read_result(path) == RESULT
    content = result_with(lambda c: c["sparsity"].update(weights={f"w{n}": 0.5 for n in range(140_000)}))
    path.write_text(json.dumps(content))
    words = "'sparsity > weights' is missing or invalid (Dictionary should have at most"
    assert words in refused(lambda: read_result(path), path)
    weights = {f"layers.{n}.p{n}.weight": 0.5 for n in range(2000)}  # as a table, of four million cells
    path.write_text(json.dumps(result_with(lambda c: c["sparsity"].update(weights=weights))))
    assert "2,000 decoder layers and 2,000 projections" in refused(lambda: read_entries([str(path)]), path)


def test_a_perplexity_that_is_not_its_nlls_is_refused(tmp_path: Path) -> None:
    """As where one of them was edited: comparisons are of both."""
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result_with(lambda c: c["perplexity"][TEXT].update(value=1.5))))
    message = refused(lambda: compare_command([str(path)], output_dir=str(tmp_path / "out")), path)
    assert "should have the value exp(nll), 13.4637, and not 1.5" in message
    assert not (tmp_path / "out").exists()


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    """Every key of the schema's that evaluate writes, with numbers of a broken model."""
    content = result_with(lambda c: c["perplexity"][TEXT].update(stderr=float("inf"), value=math.exp(700), nll=710.0))
    content["tasks"]["piqa"]["acc_stderr"] = float("nan")
    write_result(tmp_path / "r.json", content)
    told = read_result(tmp_path / "r.json")
    assert told["perplexity"][TEXT]["stderr"] is None
    assert "acc_stderr" not in told["tasks"]["piqa"]
    assert told["tasks"]["piqa"]["acc"] == 0.5


# -- pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "a$b",
        r"$\frac{",
        r"$\frac{a$",
        "$x_1^2$",
        "x_1^2",
        "_first",
        r"c:\new",
        "$$",
        "%d{}",
        "100%$",
        "\x1b[31mred",
        "a\nb",
    ],
)
def test_names_are_drawn_as_they_are(tmp_path: Path, name: str) -> None:
    """Methods, models, texts, tasks and projections, in every picture."""

    def named(content: dict[str, Any]) -> None:
        content["perplexity"] = {f"{name}.jsonl": content["perplexity"][TEXT]}
        content["tasks"] = {name: content["tasks"]["piqa"]}
        content["model"]["base_model"] = f"org/{name}"
        weights = content["sparsity"]["weights"]
        content["sparsity"]["weights"] = {key.replace("mlp.up", name): value for key, value in weights.items()}

    paths = []
    for method, fingerprint in ((name, "f00d"), ("wanda", "f00d"), (name, "beef"), ("dense", "f00d")):
        content = result_with(named)
        content["method"] = method
        content["model"]["fingerprint"] = fingerprint
        paths.append(tmp_path / f"{len(paths)}.json")
        paths[-1].write_text(json.dumps(content))
    for number, method in enumerate((name, "wanda")):
        mask = MaskSet({n: torch.ones(2, 2).bool() for n in NAMES}, Provenance("org/x", "f00d", method, 0.5))
        paths.append(mask.save(tmp_path / f"{number}.safetensors"))
    compare_command([str(path) for path in paths], output_dir=str(tmp_path / "out"))
    from xml.etree import ElementTree

    drawn = {}
    for path in (tmp_path / "out").glob("*.svg"):
        drawn[path.stem.partition("-")[0]] = " ".join(ElementTree.parse(path).getroot().itertext())
    literal = shown(name)
    for picture in ("perplexity", "accuracy", "differences", "density"):
        assert literal in re.sub(r"\s+", " ", drawn[picture]) or literal in drawn[picture], picture


def test_extreme_figures_are_drawn(tmp_path: Path) -> None:
    """The ends of what the schema lets through."""
    paths = []
    ends = [(1.0, 0.0), (1.0142320547350045e304, 1.7e308), (14.0, None), (1.0142320547350045e304, None)]
    for number, (value, stderr) in enumerate(ends):

        def change(content: dict[str, Any], value: float = value, stderr: float | None = stderr) -> None:
            content["perplexity"][TEXT] |= {"value": value, "nll": math.log(value), "stderr": stderr}
            content["perplexity"][TEXT] |= {"window_nll": [1e300, -1e300, 700.0, 1.0]}
            content["sparsity"]["weights"] = {f"layers.{n}.p.weight": n % 2 for n in range(300)}

        content = result_with(change)
        content["method"] = "wanda" if number % 2 else "m" * 256
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(content))
    compare_command([str(path) for path in paths], output_dir=str(tmp_path / "out"))
    assert max(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 10 << 20
    assert max(map(len, (tmp_path / "out" / "table.md").read_text().splitlines())) < 3000


# -- masks and records --------------------------------------------------------------------------------------

WRONG = [
    ("base_model", 7),
    ("base_model", None),
    ("fingerprint", ["f00d"]),
    ("method", {"class_path": "os.system"}),
    ("sparsity", float("nan")),
    ("sparsity", "0.5"),
    ("sparsity", 1.5),
    ("sparsity", True),
    ("revision", 1),
    ("config", [1]),
    ("config", "text"),
    ("versions", {"torch": 2}),
    ("versions", ["torch"]),
]
WRONG_CONFIG = [
    ("pattern", ["2:4"]),
    ("pattern", "0:0"),
    ("pattern", "0x0 tiles, dense or 2:4"),
    ("pattern", "9" * 50 + ":" + "9" * 50),
    ("data", "text.jsonl"),
    ("data", {"text": [1]}),
    ("data", {"seq_length": "long"}),
    ("perplexity", "low"),
    ("dense_perplexity", [1]),
]


@pytest.mark.parametrize(("key", "value"), WRONG + [(f"config > {key}", value) for key, value in WRONG_CONFIG])
@pytest.mark.parametrize("reader", ["mask", "record"])
def test_a_provenance_with_a_wrong_type(tmp_path: Path, key: str, value: Any, reader: str) -> None:
    told = copy.deepcopy(PROVENANCE)
    holder = told["config"] if key.startswith("config > ") else told
    assert isinstance(holder, dict)
    holder[key.rpartition(" ")[2]] = value
    if reader == "mask":
        path = tmp_path / "mask.safetensors"
        path.write_bytes(mask_file(json.dumps(SHAPES), json.dumps(told)))
        message = refused(lambda: MaskSet.load(path), path)
    else:
        path = tmp_path / "leap_pl.json"
        path.write_text(json.dumps({"provenance": told}))
        message = refused(lambda: exported_record(tmp_path), path)
    assert f"'{key}" in message or f"'provenance > {key}" in message


@pytest.mark.parametrize("key", ["base_model", "fingerprint", "method"])
def test_a_provenance_that_lacks_what_every_mask_has(tmp_path: Path, key: str) -> None:
    told = {name: value for name, value in PROVENANCE.items() if name != key}
    path = tmp_path / "mask.safetensors"
    path.write_bytes(mask_file(json.dumps(SHAPES), json.dumps(told)))
    assert f"'{key}' is missing or invalid (required)" in refused(lambda: MaskSet.load(path), path)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([4, 6], "(should be a valid dictionary, and is a list of 2)"),
        ({**SHAPES, NAMES[0]: "46"}, NAMES[0]),
        ({**SHAPES, NAMES[0]: [True, 24]}, NAMES[0]),
        ({**SHAPES, NAMES[0]: [4.0, 6]}, NAMES[0]),
        ({**SHAPES, NAMES[0]: [-4, -6]}, NAMES[0]),
        ({**SHAPES, NAMES[0]: [0]}, NAMES[0]),
        ({**SHAPES, NAMES[0]: []}, NAMES[0]),
        ({**SHAPES, NAMES[0]: [1 << 62, 1 << 62]}, NAMES[0]),
        ({**SHAPES, NAMES[0]: [1] * 3000}, NAMES[0]),
        ({**SHAPES, NAMES[0]: [1 << 40, 6]}, "another length"),
        ({**SHAPES, "other": [1]}, "of different weights"),
    ],
)
def test_shapes_with_a_wrong_type(tmp_path: Path, shapes: Any, words: str) -> None:
    path = tmp_path / "mask.safetensors"
    path.write_bytes(mask_file(json.dumps(shapes), json.dumps(PROVENANCE)))
    assert words in refused(lambda: MaskSet.load(path), path)


def test_unknown_keys_of_a_newer_version_and_nan_of_an_older_one(tmp_path: Path) -> None:
    told = {**PROVENANCE, "steps": 7, "config": {"dense_perplexity": float("nan"), "deep": {"x": [float("inf")]}}}
    path = tmp_path / "mask.safetensors"
    path.write_bytes(mask_file(json.dumps(SHAPES), json.dumps(told)))
    loaded = MaskSet.load(path)
    assert loaded.provenance.base_model == "org/base"
    assert loaded.provenance.config == {"dense_perplexity": None, "deep": {"x": [None]}}
    again = loaded.with_provenance(config={"perplexity": float("inf")}).save(tmp_path / "again.safetensors")
    assert MaskSet.load(again).provenance.config == {"perplexity": None}


def test_provenances_of_any_size_and_depth(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    deep = "[" * 40 + "]" * 40
    path.write_bytes(mask_file(json.dumps(SHAPES), json.dumps(PROVENANCE)[:-1] + f', "x": {deep}}}'))
    assert "nested deeper than 32" in refused(lambda: MaskSet.load(path), path)
    path.write_bytes(mask_file(json.dumps(SHAPES), json.dumps(PROVENANCE) + " " * (MOST_BYTES + 1)))
    assert "larger than 16 MiB" in refused(lambda: MaskSet.load(path), path)


def test_the_schema_has_every_field_of_a_provenance() -> None:
    assert {f.name for f in fields(Provenance)} == set(ProvenanceFields.__annotations__)
    assert provenance_fields(PROVENANCE) == PROVENANCE
    assert set(Config.__annotations__) <= {"pattern", "data", "dtype", "perplexity", "dense_perplexity"}


def test_a_layers_number_is_a_number() -> None:
    assert split_name("model.layers.3.mlp.up_proj.weight") == (3, "mlp.up_proj")
    assert split_name(f"layers.{'9' * 5000}.mlp.weight")[0] is None


# -- plain values -------------------------------------------------------------------------------------------

plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(plain_values)
def test_plain_values_are_read_as_they_are_written(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert plain(value) == value


@settings(max_examples=200, deadline=None)
@given(plain_values, st.sampled_from([float("nan"), float("inf"), -float("inf"), 10**400, -(10**25)]))
def test_no_number_beyond_is_read(value: Any, beyond: float) -> None:
    with pytest.raises(ValueError, match="'b > 0' is not a finite number"):
        parse_json(json.dumps({"a": value, "b": [beyond]}))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300), st.integers(10, 100))
def test_shown_is_one_printable_line(name: str, most: int) -> None:
    text = shown(name, most)
    assert text.isprintable()
    if name.isprintable() and len(name) <= most:
        assert text == name
